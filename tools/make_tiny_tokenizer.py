"""Makes weights/tiny_tokenizer: a small byte-level BPE with Qwen3's special tokens and template.

    python tools/make_tiny_tokenizer.py ../shared/tokenizers/qwen3/tokenizer_config.json OUT_DIR

Vocabulary and merges are trained on the text below. The text has sentences in several languages,
which are filled with numbers and names. So common words of word problems become single tokens, and
other scripts are still split into several byte pieces. The names of the special tokens and the chat
template are Qwen3's (Apache-2.0; see the file NOTICE in the result). The same text always gives the
same files.
"""

import itertools
import json
import pathlib
import sys

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCAB_SIZE = 1400  # number of byte pieces and merges, without the added tokens
# Splits text as Qwen2 and Qwen3 do: contractions, words, single digits, punctuation, line ends,
# blanks.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NOTICE = """\
The chat template and the names of the special tokens in tokenizer_config.json and tokenizer.json
are those of Qwen3 (https://huggingface.co/Qwen/Qwen3-1.7B), Copyright Alibaba Cloud, licensed under
the Apache License, Version 2.0 (http://www.apache.org/licenses/LICENSE-2.0). The template is
unchanged. The vocabulary and the merges are not Qwen3's. They were trained on the text in
tools/make_tiny_tokenizer.py, and are under the licence of this project.
"""
KEPT = (  # keys that are copied from Qwen3's tokenizer_config.json
    "additional_special_tokens",
    "bos_token",
    "chat_template",
    "clean_up_tokenization_spaces",
    "eos_token",
    "errors",
    "pad_token",
    "unk_token",
)
NAMES = ("Amina", "Juma", "Marie", "Luis", "Anna", "Sipho", "Neema", "Paul")
TEXT = """\
{n} has {a} apples and buys {b} more apples. How many apples does {n} have now?
{n} picked {a} oranges in the morning and gave {b} of them to a friend. How many are left?
There are {a} boxes on the table. Each box holds {b} pencils. How many pencils are there in all?
A shop sells {a} books on Monday and {b} books on Tuesday. How many books did the shop sell?
{n} walks {a} kilometres every day. How far does {n} walk in {b} days?
{n} shares {a} sweets equally among {b} children. How many sweets does each child get?
We start with {a}. Then we add {b}. The answer is {a}.
First we multiply {a} by {b}, then we subtract. So the total is {b}, because nothing else changes.
Please reason step by step, and put your final answer within \\boxed{{}}.
Question: what is the result? Answer: let us think about the problem. The answer is {b}.
The reference solution is correct. After reading it, solve the problem in your own words.
Wait, check the number again: it is ${a}, not ${b}. Therefore the answer is \\boxed{{{a}}}.
Solve the problem. Write the final number only. You are a helpful teacher of mathematics.
{n} ana maembe {a} na ananunua maembe {b} zaidi. Sasa {n} ana maembe mangapi?
{n} alichuma machungwa {a} asubuhi na akampa rafiki yake {b}. Yamebaki mangapi?
Kuna masanduku {a} mezani. Kila sanduku lina penseli {b}. Kuna penseli ngapi kwa jumla?
Duka liliuza vitabu {a} Jumatatu na vitabu {b} Jumanne. Duka liliuza vitabu vingapi?
Tafadhali fikiri hatua kwa hatua, kisha andika jibu la mwisho ndani ya \\boxed{{}}.
Swali: jibu ni lipi? Jibu: tunaanza na {a}, kisha tunaongeza {b}. Jibu ni {a}.
{n} a {a} pommes et achète {b} pommes de plus. Combien de pommes {n} a-t-il maintenant ?
Il y a {a} boîtes sur la table. Chaque boîte contient {b} crayons. Combien y a-t-il de crayons ?
Le magasin a vendu {a} livres lundi et {b} livres mardi. Combien de livres a-t-il vendus en tout ?
Veuillez raisonner étape par étape et mettre la réponse finale dans \\boxed{{}}.
Question : quel est le résultat ? Réponse : on commence avec {a}, puis on ajoute {b}.
{n} tiene {a} manzanas y compra {b} manzanas más. ¿Cuántas manzanas tiene {n} ahora?
Hay {a} cajas en la mesa. Cada caja tiene {b} lápices. ¿Cuántos lápices hay en total?
La tienda vendió {a} libros el lunes y {b} libros el martes. ¿Cuántos libros vendió?
Razona paso a paso y escribe la respuesta final dentro de \\boxed{{}}.
Pregunta: ¿cuál es el resultado? Respuesta: empezamos con {a} y luego sumamos {b}.
{n} hat {a} Äpfel und kauft {b} weitere Äpfel. Wie viele Äpfel hat {n} jetzt?
Auf dem Tisch stehen {a} Kisten. In jeder Kiste sind {b} Stifte. Wie viele Stifte sind es?
Bitte denke Schritt für Schritt und schreibe die Antwort in \\boxed{{}}.
{n} 有 {a} 个苹果，又买了 {b} 个苹果。现在一共有多少个苹果？请一步一步思考，答案是 {a}。
{n} さんはりんごを {a} 個持っています。さらに {b} 個買いました。全部で何個ですか。答えは {a} です。
{n} มีแอปเปิ้ล {a} ลูก และซื้อเพิ่มอีก {b} ลูก ตอนนี้มีทั้งหมดกี่ลูก คำตอบคือ {a}
{n} এর কাছে {a} টি আম আছে এবং সে আরও {b} টি আম কেনে। এখন মোট কতটি আম আছে? উত্তর হল {a}।
{n} ከ {a} ብርቱካን ጋር {b} ተጨማሪ ገዛ። አሁን ስንት አሉ? መልሱ {a} ነው።
لدى {n} عدد {a} تفاحات واشترى {b} تفاحات أخرى. كم تفاحة لديه الآن؟ الجواب هو {a}.
{n} ní ọsàn {a}, ó sì ra {b} sí i. Ọsàn mélòó ni ó ní báyìí? Ìdáhùn ni {a}.
У {n} есть {a} яблок, и он покупает ещё {b} яблок. Сколько яблок стало? Ответ: {a}.
def solve(a, b):\n    return a * b - {a} + {b} / 2  # x = {a}, y = {b}
$$\\frac{{{a}}}{{{b}}} + \\sqrt{{{a}}} \\le {b} \\cdot x^2$$ and {a} + {b} = {b} + {a}.
"""


def corpus() -> list[str]:
    """Returns every sentence with every name, filled with a few numbers."""
    lines = [line.replace("\\n", "\n") for line in TEXT.splitlines()]
    numbers = itertools.cycle((3, 14, 25, 7, 120, 48, 6, 90, 31, 5, 1250))
    return [line.format(n=n, a=next(numbers), b=next(numbers)) for n in NAMES for line in lines]


def train(added: list[tokenizers.AddedToken]) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE; the added tokens follow the vocabulary, as in Qwen3."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(corpus(), trainer)
    tok.add_tokens(added)
    return tok


def main(source: str, out: str) -> None:
    theirs = json.loads(pathlib.Path(source).read_text(encoding="utf-8"))
    entries = sorted(theirs["added_tokens_decoder"].items(), key=lambda item: int(item[0]))
    tok = train([tokenizers.AddedToken(**fields) for _, fields in entries])
    config = {key: theirs[key] for key in KEPT}
    # This class uses tokenizer.json unchanged. In some versions, Qwen3's class would replace our
    # splitter.
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32768}
    config["added_tokens_decoder"] = {
        str(tok.token_to_id(fields["content"])): fields for _, fields in entries
    }
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"), pretty=False)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "NOTICE").write_text(NOTICE, encoding="utf-8")
    print(f"{folder}: {tok.get_vocab_size()} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
