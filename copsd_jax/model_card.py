"""The model card of an exported model: README.md, with metadata for the Hugging Face Hub.

The card names method, data and settings, and shows the scores of the run's evaluations. A score
holds for one form of prompt. The card therefore shows an example of a prompt for each evaluated
language, and a program that loads the model and gives it the first of these prompts.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np

from copsd_jax.config import settings as config_lib
from copsd_jax.metrics import eval_tables
from copsd_jax.problems import languages, problem_row
from copsd_jax.runtime import storage, workdir
from copsd_jax.teaching import prompts
from copsd_jax.training import run_plan
from copsd_jax.weights import hub

EXAMPLE = "Ann has 3 apples and buys 4 more. How many apples does she have?"
# Settings that describe machines and the course of a run, but not what the model has learnt.
_UNSHOWN = re.compile(
    r"description|mesh\..*|check\..*|guards\..*|.*\.(url|key_env|folder|slots|timeout|concurrency)|"
    r"train\.(save_.*|keep|grace|log_rollouts)|model\.(remat|attention)|sampler\.(warmup|attention)"
)
_RELATION = {"hf": "finetune", "peft": "adapter", "gguf": "quantized"}
_LIBRARY = {"hf": "transformers", "base": "transformers", "peft": "peft", "gguf": "llama.cpp"}


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """The facts that a model card states.

    Attributes:
      plan: the plan of the run.
      directory: the work directory of the run.
      base: the name of the base model.
      form: the value of the export's flag --format.
      step: the step of the exported checkpoint.
      before: the result of the evaluation of step 0; None if there is none.
      after: the result of the evaluation of `step`; None if there is none.
      numbers: the dtype or the kind of quantization of the weights in the files.
      address: the name by which the snippet loads the model: a repository id, or "." for the folder
        of the card.
      file: with the format gguf, the name of the file; otherwise "".
    """

    plan: run_plan.Plan
    directory: pathlib.Path
    base: hub.BaseModel
    form: str
    step: int
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    numbers: str
    address: str = "."
    file: str = ""


class _Example(NamedTuple):
    """A problem, its language and its prompt."""

    row: problem_row.Row
    prompt: prompts.Prompt


def write_model_card(folder: pathlib.Path, facts: CardFacts, title: str) -> None:
    """Writes README.md to the folder of an exported model.

    Args:
      folder: the folder.
      facts: the facts that the card states.
      title: the first heading.
    """
    examples = _list_examples(facts)
    parts = [
        f"---\n{_front_matter(facts, examples)}\n---\n\n# {title}",
        *_describe_training(facts),
        *_describe_scores(facts),
        *_describe_prompts(facts, examples),
        *_describe_loading(facts, examples[0]),
        "## Licence\n\nThis card claims no licence. The licence of the base model applies to its "
        "weights, and may set conditions for models that are derived from it.",
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _front_matter(facts: CardFacts, examples: list[_Example]) -> str:
    """Returns the metadata of the card in YAML; only a repository id can be a base model."""
    known, method = facts.base.is_repository and facts.form != "base", facts.plan.config.method
    data = huggingface_hub.ModelCardData(
        base_model=facts.base.name if known else None,
        base_model_relation=_RELATION[facts.form] if known else None,
        language=list(dict.fromkeys(example.row.lang for example in examples)),
        library_name=_LIBRARY[facts.form],
        pipeline_tag="text-generation",
        tags=[
            "copsd_jax",
            *(["self-distillation", "on-policy"] if method == "distill" else [method]),
        ],
    )
    return data.to_yaml()


# ---- training and scores ---------------------------------------------------------------------


def _describe_training(facts: CardFacts) -> Iterator[str]:
    plan, config = facts.plan, facts.plan.config
    link = f"[{facts.base.name}](https://huggingface.co/{facts.base.name})"
    base = link if facts.base.is_repository else f"`{_hide_folder(facts.base.name)}`"
    base += f" at commit `{facts.base.commit}`" if facts.base.commit else ""
    if config.model.init == "random":
        base = f"a model with random weights (shape and tokenizer of {base})"
    if facts.form == "base":
        yield f"This model is the base of a training run, before its first step: {base}."
        return
    kind = "an adapter (LoRA) for" if facts.form == "peft" else "a fine-tuned version of"
    yield f"This model is {kind} {base}, trained with copsd_jax."
    if plan.weights_path.suffix == ".gguf" and config.model.init != "random":
        yield (
            f"In training, the base weights were those of the file `{plan.weights_path.name}`. If "
            "this file is quantized, the weights of the repository differ slightly from them."
        )
    yield "## Training"
    lines = [f"- Method: {_describe_method(config)}"]
    data = f"`{_hide_folder(config.data.path)}`, {_spell_languages(plan, config.data.lang)}"
    print_ = _read_fingerprint(facts.directory)
    lines.append(f"- Data: {data}" + (f" (SHA-256 of the problems: `{print_}`)" if print_ else ""))
    lines.append(f"- Step: {facts.step} of {config.train.steps}")
    lines.append(f"- Weights in the files: {facts.numbers}")
    yield "\n".join(lines)
    yield "These settings differ from the defaults:"
    rows = [f"{name} = {config_lib.show(value)}" for name, value in _list_settings(config).items()]
    yield _fence("\n".join(rows) or "(none)")


def _describe_method(config: config_lib.Config) -> str:
    """Returns one sentence about the objective of the training."""
    if config.method == "sft":
        return "`sft`, the cross entropy of the reference solutions."
    if config.method == "grpo":
        return f"`grpo`, a policy gradient with the reward `{config.reward.kind}`."
    mixed = f", with a policy gradient of weight {config.policy.weight}" * (
        config.policy.weight > 0
    )
    return (
        "`distill`, on-policy self-distillation: the model writes an answer, and the same network "
        f"(weights: `{config.teacher.weights}`) scores the answer's tokens with the additional "
        f"context `{config.context.kind}`; the divergence is `{config.loss.divergence}`{mixed}."
    )


def _list_settings(config: config_lib.Config) -> dict[str, Any]:
    """Returns the settings that differ from their defaults, without the folders of this machine."""
    default = config_lib.flat(config_lib.default())
    return {
        name: _hide_folder(value)
        for name, value in config_lib.flat(config).items()
        if value != default[name] and not _UNSHOWN.fullmatch(name)
    }


def _hide_folder(value: Any) -> Any:
    """Returns the last part of an absolute path or a path of this machine, or the value itself."""
    if isinstance(value, str) and os.sep in value:
        path = storage.parse_path(value)
        if path.is_absolute() or path.exists():
            return path.name
    return value


def _spell_languages(plan: run_plan.Plan, codes: tuple[str, ...]) -> str:
    known = [_find_language(plan, code).english_name for code in codes]
    return ", ".join(known) or "all languages of the file"


def _find_language(plan: run_plan.Plan, code: str) -> languages.Language:
    registry = plan.evaluation.languages
    return registry[languages.resolve_code(code, registry)]


def _read_fingerprint(directory: pathlib.Path) -> str:
    """Returns the hash of the training problems that run.json records, or ""."""
    file = directory / "run.json"
    starts: list[dict] = workdir.read_starts(file) if file.is_file() else [{}]
    return str(starts[0].get("data_fingerprint", ""))


def _describe_scores(facts: CardFacts) -> Iterator[str]:
    columns = {"before training": facts.before, f"after step {facts.step}": facts.after}
    found = {name: result for name, result in columns.items() if result is not None}
    yield "## Scores"
    if not found:
        yield "This checkpoint was not evaluated."
        return
    e = facts.plan.config.eval
    how = "greedy decoding"
    if e.temperature > 0:
        drawn = config_lib.pick(e, "temperature top_p top_k min_p")
        used = [f"{name} {value:g}" for name, value in drawn.items() if value]
        how = f"{e.samples} sampled answers per problem ({', '.join(used)})"
    yield (
        f"The scores are shares of correct answers to `{_hide_folder(e.path)}`, with {how} and at "
        f"most {_count_tokens(facts)} tokens. The 95 % intervals are Wilson's; the intervals of a "
        "difference come from a paired bootstrap over the problems."
    )
    yield eval_tables.format_markdown_scores(found)
    if facts.numbers not in ("float32", np.dtype(facts.plan.dtype).name):
        yield (
            "The scores were measured by the training program, before the weights were rounded to "
            f"{facts.numbers} for these files."
        )


def _count_tokens(facts: CardFacts) -> int:
    config = facts.plan.config
    return config.eval.max_tokens or config.rollout.max_tokens


# ---- prompts ---------------------------------------------------------------------------------


def _list_examples(facts: CardFacts) -> list[_Example]:
    """Returns an example for each evaluated language, or for the first language of the settings."""
    plan = facts.plan
    records = ((facts.after or facts.before) or {"problems": []})["problems"]
    rows: dict[str, problem_row.Row] = {}
    for x in records:
        row = problem_row.Row(x["id"], x["problem"], "", x["gold"], x["lang"], "", x["group"])
        rows.setdefault(row.lang, row)
    if not rows:
        codes = plan.config.eval.lang or plan.config.data.lang or ("en",)
        lang = _find_language(plan, codes[0]).code
        rows[lang] = problem_row.Row("example", EXAMPLE, "", "7", lang, "")
    return [
        _Example(row, prompts.build_student_prompt(plan.tokenizer, plan.evaluation, row))
        for row in rows.values()
    ]


def _describe_prompts(facts: CardFacts, examples: list[_Example]) -> Iterator[str]:
    yield "## Prompt"
    yield (
        "The scores hold for prompts of exactly this form. With other prompts, the model may "
        "answer worse."
    )
    for example in examples:
        name = _find_language(facts.plan, example.row.lang).english_name
        yield f"An example in {name}:"
        yield _fence(example.prompt.text)
    if stops := facts.plan.config.rollout.stop:
        yield f"An answer also ends at one of these strings: {', '.join(map(_code, stops))}."


def _code(text: str) -> str:
    return f"`{text!r}`"


def _fence(text: str, language: str = "text") -> str:
    """Returns a code block; its fence is longer than every run of backquotes in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    end = "" if text.endswith("\n") else "\n"
    return f"{fence}{language}\n{text}{end}{fence}"


# ---- loading ---------------------------------------------------------------------------------


def _describe_loading(facts: CardFacts, example: _Example) -> Iterator[str]:
    packages = {"peft": "transformers torch peft", "gguf": "llama-cpp-python"}
    yield "## Use"
    yield _fence(f"pip install {packages.get(facts.form, 'transformers torch')}", "sh")
    where = "in this folder" if facts.address == "." else "anywhere"
    yield f"Run this program {where}:"
    yield _fence(write_snippet(facts, example), "python")


def write_snippet(facts: CardFacts, example: _Example) -> str:
    """Returns a program that loads the model and answers a problem as the evaluation does.

    The prompt is written as text. If the tokenizer does not encode the text to the ids of the
    prompt, the ids are written instead.
    """
    ids = [*example.prompt.prefix_ids, *example.prompt.ids]
    encode = lambda special: facts.plan.tokenizer.encode(  # noqa: E731
        example.prompt.text, add_special_tokens=special
    )
    special = next((flag for flag in (False, True) if encode(flag) == ids), None)
    spelled = f"ids = {ids}\n" if special is None else _spell_prompt(example)
    write = _write_llama_program if facts.form == "gguf" else _write_transformers_program
    return write(facts, spelled, special, len(ids))


def _spell_prompt(example: _Example) -> str:
    """Returns the assignments of `problem` and `prompt`; each line of the prompt has its own."""
    text, problem = example.prompt.text, example.row.problem
    before, found, after = text.rpartition(problem)
    lines = [f"problem = {problem!r}\n"] if found else []
    pieces = [repr(line) for line in re.findall(r"[^\n]*\n|[^\n]+", before if found else text)]
    if found:
        pieces.append(("+ " if pieces else "") + "problem")
        rest = [repr(line) for line in re.findall(r"[^\n]*\n|[^\n]+", after)]
        pieces += [f"+ {rest[0]}", *rest[1:]] if rest else []
    return "".join([*lines, "prompt = (\n", *(f"    {piece}\n" for piece in pieces), ")\n"])


def _write_transformers_program(
    facts: CardFacts, prompt: str, special: bool | None, length: int
) -> str:
    library = {"peft": "peft.AutoPeftModelForCausalLM"}
    call = library.get(facts.form, "transformers.AutoModelForCausalLM")
    config, stops = facts.plan.config, list(facts.plan.vocabulary.stop_ids)
    drawn = config_lib.pick(config.eval, "temperature top_p top_k min_p")
    how = {"do_sample": config.eval.temperature > 0}
    how |= drawn if config.eval.temperature > 0 else {}
    options = {"max_new_tokens": _count_tokens(facts), **how, "repetition_penalty": 1.0,
               "eos_token_id": stops, "pad_token_id": stops[0]}  # fmt: skip
    if config.rollout.stop:
        options["stop_strings"] = list(config.rollout.stop)
    spelled = "".join(f"    {name}={value!r},\n" for name, value in options.items())
    spelled += "    tokenizer=tokenizer,\n" * bool(config.rollout.stop)
    ids = "ids" if special is None else f"tokenizer.encode(prompt, add_special_tokens={special})"
    first = "import peft\n" * (facts.form == "peft")
    return (
        f"{first}import torch\nimport transformers\n\npath = {facts.address!r}\n"
        "tokenizer = transformers.AutoTokenizer.from_pretrained(path)\n"
        f'model = {call}.from_pretrained(path, dtype="auto")\n\n'
        f"{prompt}inputs = torch.tensor([{ids}])\n"
        "output = model.generate(\n"
        "    input_ids=inputs, attention_mask=torch.ones_like(inputs),\n"
        f"{spelled})\n"
        "print(tokenizer.decode(output[0, inputs.shape[1]:], skip_special_tokens=True))"
    )


def _write_llama_program(facts: CardFacts, prompt: str, special: bool | None, length: int) -> str:
    config, most = facts.plan.config, _count_tokens(facts)
    room = min(-(-(2 * length + most) // 256) * 256, facts.plan.model_config.max_position)
    drawn = config_lib.pick(config.eval, "temperature top_p top_k min_p")
    options = {"max_tokens": most, **drawn, "repeat_penalty": 1.0}
    if config.rollout.stop:
        options["stop"] = list(config.rollout.stop)
    spelled = ", ".join(f"{name}={value!r}" for name, value in options.items())
    ids = f"model.tokenize(prompt.encode(), add_bos={special}, special=True)"
    load = f"Llama({facts.file!r}, n_ctx={room}, verbose=False)"
    if facts.address != ".":
        load = (
            f"Llama.from_pretrained({facts.address!r}, {facts.file!r}, n_ctx={room}, verbose=False)"
        )
    return (
        f"import llama_cpp\n\nmodel = llama_cpp.{load}\n\n{prompt}"
        f"tokens = {'ids' if special is None else ids}\n"
        f"output = model.create_completion(tokens, {spelled})\n"
        'print(output["choices"][0]["text"])'
    )
