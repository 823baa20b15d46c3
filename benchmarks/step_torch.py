"""A step of self-distillation in torch and transformers, for benchmarks/step.py.

    python benchmarks/step_torch.py work.json

The script prints a line of JSON when the model is loaded. Then it runs a step for each line of
standard input, and prints a line. An input line has the completions to train on as JSON, or null to
train on the completions that the step samples.

The code follows common practice. LoRA is applied beside frozen linear layers, and merged into them
while `generate` runs with its cache. Attention is scaled dot product attention. The teacher runs
without gradient. The head is applied only at the positions of completions. Rows have no padding.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import step_memory
import torch
import transformers
from torch.nn import functional

NAMES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


class Adapted(torch.nn.Module):
    """A frozen linear layer and a low-rank adapter beside it: a [R, in], b [out, R], float32."""

    on = True  # whether the adapters of all layers are applied; False for the teacher

    def __init__(self, linear: torch.nn.Linear, a: np.ndarray, b: np.ndarray, scale: float):
        super().__init__()
        self.linear, self.scale = linear, scale
        self.a = torch.nn.Parameter(torch.tensor(a.T.copy(), device=linear.weight.device))
        self.b = torch.nn.Parameter(torch.tensor(b.T.copy(), device=linear.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if not Adapted.on:
            return y
        # The scale is applied to the narrower of the two products.
        low = functional.linear(x, self.a.to(x.dtype)) * self.scale
        return y + functional.linear(low, self.b.to(x.dtype))

    @torch.no_grad()
    def merge(self, sign: float) -> None:
        self.linear.weight.addmm_(
            self.b.to(self.linear.weight.dtype), self.a.to(self.linear.weight.dtype),
            alpha=sign * self.scale,
        )  # fmt: skip


class Parts:
    """Wall and processor seconds of each part of a step."""

    def __init__(self, device: torch.device):
        self._device = device
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.wall[part] = self.wall.get(part, 0.0) + time.perf_counter() - wall
        self.cpu[part] = self.cpu.get(part, 0.0) + time.process_time() - cpu


def divergence(student: torch.Tensor, teacher: torch.Tensor, work: dict) -> torch.Tensor:
    """Returns the mean over tokens of the divergence between two arrays of logits [T, V]."""
    logp, logq = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    if work["divergence"] == "fkl":
        return functional.kl_div(logp, logq, log_target=True, reduction="sum") / len(logp)
    beta = work["beta"]
    mix = torch.logaddexp(logp + np.log1p(-beta), logq + np.log(beta))
    to = lambda log: functional.kl_div(mix, log, log_target=True, reduction="sum")  # noqa: E731
    return (beta * to(logq) + (1 - beta) * to(logp)) / len(logp)


def load(work: dict) -> tuple[Any, list[Adapted], torch.device]:
    """Loads the model with its adapters; every id may be drawn, and no id ends a text."""
    torch.set_num_threads(work["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        work["weights"], dtype=getattr(torch, work["dtype"]), attn_implementation="sdpa"
    )
    model = model.to(device).eval().requires_grad_(False)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None
    )
    saved, adapters = np.load(work["adapter"]), []
    for name in sorted({key.split("/")[0] for key in saved}):
        owner, leaf = NAMES[name].split(".")
        for index, layer in enumerate(model.model.layers):
            linear = getattr(getattr(layer, owner), leaf)
            a, b = (saved[f"{name}/{factor}"][index] for factor in "ab")
            adapters.append(Adapted(linear, a, b, work["adapter_scale"]))
            setattr(getattr(layer, owner), leaf, adapters[-1])
    return model, adapters, device


def rollout(model, adapters, device: torch.device, work: dict) -> list[list[int]]:
    """Samples one completion for each prompt; returns the token ids."""
    prompt_BL = torch.tensor(work["student_prompts"], device=device)
    if work["torch_merge"]:
        for adapter in adapters:
            adapter.merge(1.0)
        Adapted.on = False
    out_BL = model.generate(
        input_ids=prompt_BL, attention_mask=torch.ones_like(prompt_BL),
        max_new_tokens=work["completion"],
    )  # fmt: skip
    if work["torch_merge"]:
        for adapter in adapters:
            adapter.merge(-1.0)
        Adapted.on = True
    out_BC = out_BL[:, prompt_BL.shape[1] :]
    assert out_BC.shape == (len(prompt_BL), work["completion"]), out_BC.shape
    return out_BC.cpu().tolist()


def hidden(model, ids_BL: torch.Tensor, prompt: int) -> torch.Tensor:
    """Returns the hidden states [B x C, D] that predict the completions' tokens."""
    out_BLD = model.model(input_ids=ids_BL, use_cache=False).last_hidden_state
    return out_BLD[:, prompt - 1 : -1].flatten(0, 1)


def train(model, optimizer, rows: tuple, work: dict, part: Parts) -> tuple[float, float]:
    """Computes the gradient of a batch and updates; returns the loss and the gradient norm."""
    total, micro = 0.0, work["torch_micro_batch"] or len(rows[0])
    for student_BL, teacher_BL in zip(*(x.split(micro) for x in rows), strict=True):
        with part("teacher"), torch.no_grad():
            Adapted.on = False
            hidden_t = hidden(model, teacher_BL, work["teacher"])
            Adapted.on = True
        with part("student"):
            hidden_s = hidden(model, student_BL, work["prompt"])
        with part("loss"):
            with torch.no_grad():
                logits_t = model.lm_head(hidden_t)
            leaf = hidden_s.detach().requires_grad_(True)
            loss = divergence(model.lm_head(leaf), logits_t, work) * len(student_BL) / len(rows[0])
            loss.backward()
            total += loss.item()
            del logits_t, loss
        with part("student"):
            hidden_s.backward(leaf.grad)
    with part("update"):
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, work["max_grad_norm"]).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, norm


def step(model, adapters, optimizer, device, work: dict, given: list | None) -> dict:
    """Runs one step; returns its times, loss, gradient norm and memory."""
    part = Parts(device)
    wall, cpu = time.perf_counter(), time.process_time()
    with part("rollout"):
        sampled = rollout(model, adapters, device, work)
    with part("packing"):
        rows = tuple(
            torch.tensor([p + c for p, c in zip(prompts, given or sampled, strict=True)]).to(device)
            for prompts in (work["student_prompts"], work["teacher_prompts"])
        )
    loss, norm = train(model, optimizer, rows, work, part)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    part.wall["host"] = seconds - sum(part.wall.values())
    part.cpu["host"] = cpu_seconds - sum(part.cpu.values())
    return {
        "seconds": seconds, "cpu_seconds": cpu_seconds, "parts": part.wall, "cpu_parts": part.cpu,
        "loss": loss, "grad_norm": norm, "memory": step_memory.peak(),
    }  # fmt: skip


def matmul_rate(device: torch.device, dtype: str, size: int = 2048) -> float:
    """Measures the FLOP/s of a product of square matrices; best of 7."""
    a = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
    part = Parts(device)
    seconds = []
    for _ in range(7):
        part.wall.clear()
        with part("product"):
            torch.mm(a, a)
        seconds.append(part.wall["product"])
    return 2 * size**3 / min(seconds)


def main(file: str) -> int:
    with open(file, encoding="utf-8") as stream:
        work = json.load(stream)
    torch.manual_seed(work["seed"])
    model, adapters, device = load(work)
    trained = [x for adapter in adapters for x in (adapter.a, adapter.b)]
    t = work["optimizer"]
    optimizer = torch.optim.AdamW(
        trained, lr=t["lr"], betas=(t["b1"], t["b2"]), eps=t["eps"], weight_decay=t["weight_decay"]
    )
    known = {
        "loaded": step_memory.now(), "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    print(json.dumps(known), flush=True)
    done = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked == "end":
            done = {"matmul_rate": matmul_rate(device, work["dtype"])}
        else:
            done = step(model, adapters, optimizer, device, work, asked)
        print(json.dumps(done), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
