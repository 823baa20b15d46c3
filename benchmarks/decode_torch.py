"""Runs transformers' `generate` for benchmarks/decode.py on the pieces of a work file.

    python benchmarks/decode_torch.py work.json

The script prints a line of JSON when the model is warm. Then it reads numbers of pieces from
standard input, and prints a line for each piece.
"""

import json
import sys
import time
from typing import Any

import torch
import transformers


def load(work: dict) -> tuple[transformers.PreTrainedModel, torch.device]:
    """Loads the model; every id may be drawn, and no id ends a text."""
    torch.set_num_threads(work["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        work["weights"], dtype=getattr(torch, work["dtype"]), attn_implementation="sdpa"
    )
    model = model.to(device).eval()
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None
    )
    return model, device


def log_prob_difference(model, device: torch.device, prompt: list[int], logps: list) -> float:
    """Returns the largest difference from the given log-probabilities of a prompt's tokens."""
    ids_1L = torch.tensor([prompt], device=device)
    with torch.inference_mode():
        logp_LV = model(ids_1L).logits[0, :-1].float().log_softmax(-1)
    mine = logp_LV.gather(1, ids_1L[0, 1:, None])[:, 0].cpu()
    return float((mine - torch.tensor(logps)).abs().max())


def generate(model, device: torch.device, prompts: list[list[int]], new: int) -> int:
    """Samples `new` tokens for each prompt; returns the prompt tokens run, including padding."""
    width = max(map(len, prompts))
    ids_BL = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask_BL = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    out = model.generate(input_ids=ids_BL, attention_mask=mask_BL, max_new_tokens=new)
    assert out.shape == (len(prompts), width + new), out.shape
    out.cpu()  # waits for the device
    return ids_BL.numel()


def main(file: str) -> int:
    with open(file, encoding="utf-8") as stream:
        work = json.load(stream)
    model, device = load(work)
    torch.manual_seed(work["seed"])
    difference = log_prob_difference(model, device, work["prompts"][0], work["logps"])
    begun = time.perf_counter()
    for _ in range(2):
        first = [work["prompts"][i] for i in work["pieces"][0][0]]
        generate(model, device, first, work["warm_limit"])
    known = {
        "compile_seconds": time.perf_counter() - begun, "logp_difference": difference,
        "cache": work["dtype"], "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    print(json.dumps(known), flush=True)
    for line in sys.stdin:
        begun, prompt_tokens = time.perf_counter(), 0
        for batch in work["pieces"][int(line)]:
            prompts = [work["prompts"][i] for i in batch]
            prompt_tokens += generate(
                model, device, prompts, max(work["limits"][i] for i in batch)
            )  # fmt: skip
        seconds = time.perf_counter() - begun
        print(json.dumps({"seconds": seconds, "prompt_tokens": prompt_tokens}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
