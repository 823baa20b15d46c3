"""`--dry_run=v5e:4x8`: what a run would need and take on devices that nobody has to own.

Compiles every program (`aot`), adds up memory by part, reads FLOPs and collectives out of the
compiled text (`compiled`), estimates times by roofline, and says what fits. No weight, tokenizer,
file of problems or network is needed: shapes and caps on lengths come from the settings.
"""

import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from copsd_jax.config import settings as config_lib
from copsd_jax.dryrun import budget, program_cost, programs, topologies
from copsd_jax.runtime import hardware, sharding
from copsd_jax.training import memory, table_rules

GIB = 2**30
REACHED = 0.7  # of the maker's rates, which is what well-made programs reach; not measured here


def main(config: Any, target: hardware.Target, out: str, search: bool) -> int:
    """Compiles, prints the report, writes it as JSON to `out` if that is not empty.

    Returns:
      0 if the run fits, 1 if it does not.

    Raises:
      ValueError: for settings or devices that no run could have.
      OSError: if `out` cannot be written.
    """
    table_rules.check(config, data=False)
    said = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    limit = hardware.usable_memory(target.chip)
    built = programs.compile_run(config, target, topologies.make_devices(target), limit, said)
    found = build_report(built)
    if search and found["fits"]:
        found["largest"]["checked"] = compile_proposals(built, found["largest"], said)
    print(format_report(found))
    if out:
        pathlib.Path(out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["fits"] else 1


def build_report(built: programs.CompiledRun) -> dict:
    """Everything that is known of a dry run, as JSON has it; bytes, seconds, FLOPs of a device."""
    one, chip = built.frame, built.target.chip
    usable = hardware.usable_memory(chip)
    fits = all(phase.total <= usable and not _failed(phase) for phase in built.phases.values())
    found = {
        "target": built.target.name,
        "devices": one.mesh.devices.size,
        "device": built.target.kind,
        "mesh": {name: int(size) for name, size in one.mesh.shape.items()},
        "whole": memory.describe_undivided(one),
        "usable": usable,
        "fits": fits,
        "lengths": built.lengths._asdict(),
        "phases": {name: _phase(phase) for name, phase in built.phases.items()},
        "model": {name: _model(built, name, phase) for name, phase in built.phases.items()},
        "time": estimate_times(built),
        "largest": propose_sizes(built),
        "compile_seconds": round(built.seconds, 1),
    }
    # Where the compiler has shown the model to promise too much, so do its proposals.
    short = max(
        (
            phase.total / found["model"][name]["total"]
            for name, phase in built.phases.items()
            if found["model"][name] and not _failed(phase)
        ),
        default=1.0,
    )
    room = usable / max(1.0, short)
    found["advice"] = [] if fits else budget.advice(one, built.target, built.lengths, room)
    found["sentence"] = write_sentence(built, found)
    return found


def _failed(phase: programs.Phase) -> bool:
    return any(program.failure for program in phase.programs)


def _phase(phase: programs.Phase) -> dict:
    programs = {}
    for program in phase.programs:
        facts = program.facts
        one: dict = {"arguments": program.arguments, "needed": program.needed}
        if facts is None:
            one["failure"] = program.failure
        else:
            axes = program_cost.sum_by_axes(facts)
            one |= {
                "compile_seconds": round(facts.seconds, 1), "flops": facts.flops,
                "bytes": facts.bytes, "temporary": facts.temporary,
                "collectives": {axis: {kind: list(pair) for kind, pair in kinds.items()}
                                for axis, kinds in axes.items()},
            }  # fmt: skip
        programs[program.name] = one
    return {
        "parts": phase.parts, "working": phase.working, "total": phase.total, "programs": programs,
    }  # fmt: skip


def _model(built: programs.CompiledRun, name: str, phase: programs.Phase) -> dict:
    """The model of memory beside what the compiler reports, where it reports all of a phase."""
    parts = budget.parts(built.frame, built.lengths, name)
    if parts is None:
        return {}
    total = sum(parts.values())
    of_compiler = None if _failed(phase) else total / max(1, phase.total)
    return {"parts": parts, "total": total, "of_compiler": of_compiler}


# --- time -------------------------------------------------------------------------------------


def estimate_times(built: programs.CompiledRun) -> dict:
    """Seconds of a step's parts at the caps: every completion as long as it may be."""
    chip, c = built.target.chip, built.frame.config
    completions = config_lib.completions_per_step(c)
    out = {}
    for name in ("rollout", "author"):
        if name in built.phases:
            out[name] = _sampling(built, name, completions)
    if "hand-over" in built.phases:
        out["hand-over"] = _seconds(_each_step(built), chip)
    if "step" in built.phases:
        out["step"] = _seconds(built.phases["step"].programs, chip)
    if any(value is None for value in out.values()):
        return {"parts": out}
    total = sum(out.values())
    tokens = completions * c.rollout.max_tokens
    found = {"parts": out, "total": total, "tokens_per_second": tokens / total if total else 0.0}
    if "step" in out:
        flops = sum(p.facts.flops for p in built.phases["step"].programs if p.facts)
        found["step_mfu"] = flops / (out["step"] * chip.flops) if out["step"] else 0.0
    return found


def _each_step(built: programs.CompiledRun) -> list[programs.Program]:
    """Programs of the hand-over that run every step: under adapters the base moves once a run."""
    programs = built.phases["hand-over"].programs
    lora = built.frame.config.train.trainable == "lora"
    merged = built.frame.config.sampler.merge
    if not lora or merged:
        return programs
    return [program for program in programs if not program.name.startswith("weights")]


def _seconds(programs: list[programs.Program], chip: hardware.Chip) -> float | None:
    """By roofline, one program after the other; None if one of them was not compiled."""
    total = 0.0
    for program in programs:
        if program.facts is None:
            return None
        total += max(program_cost.roofline_seconds(program.facts, chip)) / REACHED
    return total


def _sampling(built: programs.CompiledRun, name: str, texts: int) -> float | None:
    """A phase of sampling: slots filled in waves, each prompt prefilled, each token drawn."""
    chip, c, long = built.target.chip, built.frame.config, built.lengths
    programs = built.phases[name].programs
    asked, drawn = {
        "rollout": (long.student, long.completion), "author": (long.writer, long.reply),
    }[name]  # fmt: skip
    by_name = {program.name: program for program in programs}
    decode = next((p for p in programs if p.name.startswith("decode")), None)
    if decode is None or decode.facts is None:
        return None
    widths = [int(key.split()[1]) for key in by_name if key.startswith("prefill")]
    width = min(w for w in widths if w >= min(max(widths), max(c.sampler.pack, asked)))
    prefill = _seconds([by_name[f"prefill {width}"]], chip)
    shards = sharding.batch_shards(built.frame.mesh)
    prompts = texts // (c.rollout.per_prompt if name == "rollout" else 1)
    rows = math.ceil(math.ceil(prompts / shards) / max(1, width // asked))
    slots = int(decode.name.split()[1])
    steps = math.ceil(texts / slots) * drawn
    token = _seconds([decode], chip)
    if token is None or prefill is None:
        return None
    return rows * prefill + steps * token / c.sampler.steps


# --- what fits --------------------------------------------------------------------------------


def propose_sizes(built: programs.CompiledRun) -> dict:
    """The largest micro-batch of completions and numbers of slots that fit, by the model of memory
    around what was compiled; 0 if none does."""
    one, long = built.frame, built.lengths
    usable = hardware.usable_memory(built.target.chip)
    out: dict[str, int] = {}
    if "step" in built.phases:
        now = built.phases["step"].total
        base = sum((budget.parts(one, long, "step") or {}).values())
        most = max(
            (
                micro
                for micro in budget.micro_batches(one.config, sharding.batch_shards(one.mesh))
                if now - base + sum((budget.parts(one, long, "step", micro=micro) or {}).values())
                <= usable
            ),
            default=0,
        )
        name, value = budget.micro_setting(one, long, most or 1)
        out[name] = value if most else 0
    shards = sharding.batch_shards(one.mesh)
    for name, setting in (("rollout", "rollout.slots"), ("evaluation", "eval.slots")):
        if name in built.phases and "cache" in built.phases[name].parts:
            phase = built.phases[name]
            section = one.config[setting.partition(".")[0]]
            slots = -(-section.slots // shards) * shards
            of_slot = phase.parts["cache"] / slots
            # What a step of decoding takes grows with the slots too.
            decode = next((p for p in phase.programs if p.name.startswith("decode")), None)
            work = decode.needed / slots if decode and decode.facts else 0.0
            room = usable - (phase.total - phase.parts["cache"])
            most = max(0, int(room / (of_slot + work))) // shards * shards
            # More slots than a step has completions would stay empty.
            texts = config_lib.completions_per_step(one.config)
            out[setting] = min(most, -(-texts // shards) * shards) if name == "rollout" else most
    return out


def compile_proposals(
    built: programs.CompiledRun, found: dict, said: Callable[[str], None]
) -> dict:
    """Compiles once more with the largest sizes; whether they fit."""
    config = built.frame.config.copy_and_resolve_references()
    config.unlock()
    for name, value in found.items():
        section, _, key = name.partition(".")
        if value:
            config[section][key] = value
    config.lock()
    usable = hardware.usable_memory(built.target.chip)
    devices = list(built.frame.mesh.devices.flat)
    again = programs.compile_run(config, built.target, devices, usable, said)
    return {
        name: {"total": phase.total, "fits": phase.total <= usable and not _failed(phase)}
        for name, phase in again.phases.items()
    }


# --- words ------------------------------------------------------------------------------------


def write_sentence(built: programs.CompiledRun, found: dict) -> str:
    """First of the report: whether it fits; if not, by how much, and what would."""
    usable, kind = found["usable"], built.target.kind
    needs = {name: need(phase, found["model"][name]) for name, phase in built.phases.items()}
    name = max(needs, key=lambda name: needs[name])
    most, have = needs[name] / GIB, usable / GIB
    where = f"{found['devices']} x {kind}"
    if found["fits"]:
        return (
            f"fits: the {name} takes most, {most:.2f} of {have:.2f} GiB on each device of {where}"
        )
    cure = f"; {found['advice'][0]} would fit" if found["advice"] else ""
    if most <= have:
        why = next(p.failure for ph in built.phases.values() for p in ph.programs if p.failure)
        return f"does not fit: the compiler finds no room on {where}: {why}{cure}"
    return (
        f"does not fit: the {name} needs {most:.2f} GiB on each device of {where}, which has "
        f"{have:.2f}: {most - have:.2f} GiB too much{cure}"
    )


def need(phase: programs.Phase, model: dict) -> float:
    """Bytes of a phase; by the model of memory where the compiler was not asked or did not say."""
    return max(phase.total, model.get("total", 0)) if _failed(phase) else phase.total


def format_report(found: dict) -> str:
    """The report for people."""
    caps = ", ".join(f"{name} {value}" for name, value in found["lengths"].items() if value)
    lines = [found["sentence"], ""]
    lines += [
        f"target      {found['target']}: {found['devices']} devices, mesh {found['mesh']}",
        *([f"whole       {found['whole']}"] if found["whole"] else []),
        f"lengths     at the caps: {caps}",
        "",
        "memory on each device, GiB",
    ]
    lines += _table(found)
    lines += ["", "programs: FLOP, bytes, and what travels, on each device"]
    for phase, one in found["phases"].items():
        for name, program in _told(one["programs"]).items():
            lines += _program(f"{phase}: {name}", program)
    lines += ["", *_time(found["time"]), ""]
    for name, value in found["largest"].items():
        if name != "checked":
            told = f"{name}={value}" if value else f"no {name}"
            lines.append(f"largest that is of use and fits, by the model of memory: {told}")
    for name, one in found["largest"].get("checked", {}).items():
        state = "fits" if one["fits"] else "does not fit"
        lines.append(f"  compiled with them: {name} {one['total'] / GIB:.2f} GiB, {state}")
    for line in found["advice"]:
        lines.append(f"would fit, by the model of memory: {line}")
    lines.append(f"compiled in {found['compile_seconds']:.0f} s")
    return "\n".join(lines)


def _table(found: dict) -> list[str]:
    lines = []
    for name, phase in found["phases"].items():
        parts = {k: v for k, v in phase["parts"].items() if v}
        model = found["model"].get(name) or {}
        kept = min(model.get("parts", {}).get("activations", 0), phase["working"])
        told = [f"{k} {v / GIB:.2f}" for k, v in parts.items()]
        if kept:
            told.append(f"activations {kept / GIB:.2f}")
        told.append(f"temporaries {(phase['working'] - kept) / GIB:.2f}")
        told = told if not any("failure" in p for p in phase["programs"].values()) else told[:-1]
        share = phase["total"] / found["usable"]
        lines.append(f"  {name:<11} {phase['total'] / GIB:8.2f} ({share:4.0%})  {', '.join(told)}")
        if model:
            told = "" if model["of_compiler"] is None else f", {model['of_compiler'] - 1:+.0%}"
            lines.append(f"  {'':<11} {model['total'] / GIB:8.2f} by the model of memory{told}")
    return lines


def _told(programs: dict) -> dict:
    """Without those of smaller buckets of prompts, and those that only copy."""
    buckets = [name for name in programs if name.startswith("prefill")]
    quiet = (*buckets[:-1], "empty cache", *(n for n in programs if n.startswith("insert")))
    return {name: program for name, program in programs.items() if name not in quiet}


def _program(name: str, program: dict) -> list[str]:
    if "failure" in program:
        return [f"  {name}: {program['failure']}"]
    lines = [
        f"  {name:<34} {program['flops']:.2e} FLOP  {program['bytes'] / 1e9:10.2f} GB  "
        f"{program['temporary'] / GIB:6.2f} GiB temporary"
    ]
    for axis, kinds in program["collectives"].items():
        told = ", ".join(f"{n} {kind} {size / 2**20:,.1f} MiB" for kind, (n, size) in kinds.items())
        lines.append(f"    over {axis or 'no axis'}: {told}")
    return lines


def _time(found: dict) -> list[str]:
    if "total" not in found:
        return ["time: not estimated, since a program was not compiled"]
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in found["parts"].items())
    lines = [
        f"a step, by roofline at {REACHED:.0%} of the makers' rates, with every text at its cap: "
        f"{found['total']:.2f} s ({parts}), {found['tokens_per_second']:,.0f} completion tokens/s"
    ]
    if "step_mfu" in found:
        lines.append(
            "FLOPs utilisation of the training step, padding and recomputation included: "
            f"{found['step_mfu']:.0%}"
        )
    return lines
