"""Report of `--dry_run=v5e:4x8`: memory and time of a run on devices that are not present.

In a dry run, `programs` compiles every program and adds up the memory of each part. `program_cost`
reads FLOPs and collectives from the compiled text, and makes roofline estimates of times.
`proposals` finds settings with which the run would fit. A dry run needs no weights, tokenizer,
problems or network, because shapes and lengths come from the settings.
"""

import json
import math
import pathlib
import sys
from typing import Any

from copsd_jax.config import settings as config_lib
from copsd_jax.dryrun import memory, program_cost, programs, proposals, targets, topologies
from copsd_jax.runtime import hardware, sharding
from copsd_jax.training import table_rules

GIB = 2**30
EFFICIENCY = 0.7  # assumption: good programs reach this share of the manufacturers' rates


def report_dry_run(
    config: config_lib.Config, target: targets.Target, out: str, search: bool
) -> int:
    """Compiles a run, prints the report, and writes it as JSON.

    Args:
      config: the settings of the run.
      target: the devices to compile for.
      out: the path of the JSON file; '' for no file.
      search: whether to compile again with the proposed settings.

    Returns:
      The exit code: 0 if the run fits, otherwise 1.

    Raises:
      ValueError: if no run can have these settings, or if the devices do not exist.
      OSError: if `out` cannot be written.
    """
    table_rules.check_choices(config, data=False)
    run = _compile_run(config, target, topologies.make_devices(target))
    proposed = proposals.propose(run)
    report = build_report(run, proposed)
    if search:
        add_checks(report, run, proposed)
    print(format_report(report))
    if out:
        pathlib.Path(out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if report["fits"] else 1


def _compile_run(config: config_lib.Config, target: targets.Target, devices: list) -> programs.Run:
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    usable = hardware.compute_usable_memory(target.chip)
    return programs.compile_run(config, target, devices, usable, say)


def build_report(run: programs.Run, proposed: proposals.Proposals) -> dict[str, Any]:
    """Builds the report as a JSON object; bytes, seconds and FLOPs are per device."""
    frame = run.frame
    report = {
        "target": run.target.name,
        "devices": frame.mesh.devices.size,
        "device": run.target.kind,
        "mesh": {name: int(size) for name, size in frame.mesh.shape.items()},
        "whole": memory.report_undivided_memory(frame),
        "usable": run.usable,
        "fits": run.fits(),
        "lengths": run.lengths._asdict(),
        "phases": {name: _describe_phase(phase) for name, phase in run.phases.items()},
        "time": estimate_dry_run_times(run),
        "largest": dict(proposed.largest),
        "advice": [{"settings": one.words, "held": one.held} for one in proposed.changes],
        "compiled_again": proposed.compilations,
        "compile_seconds": round(run.seconds, 1),
    }
    return report | {"sentence": summarize_dry_run(run, report)}


def add_checks(report: dict[str, Any], run: programs.Run, proposed: proposals.Proposals) -> None:
    """Compiles a run with the proposed settings; adds to the report whether this run fits.

    If the original run fits, the largest sizes that fit are tried. If the original run does not
    fit, the first proposed change is tried.
    """
    sizes = {name: value for name, value in proposed.largest.items() if value}
    if report["fits"]:
        config, target = proposals.apply_proposed_settings(run.frame.config, sizes), run.target
        place = report["largest"]
    elif proposed.changes:
        config, target = proposed.changes[0].config, proposed.changes[0].target
        place = report["advice"][0]
    else:
        return
    same = target is run.target
    devices = list(run.frame.mesh.devices.flat) if same else topologies.make_devices(target)
    again = _compile_run(config, target, devices)
    place["checked"] = {
        name: {"total": phase.total, "fits": phase.fits(again.usable)}
        for name, phase in again.phases.items()
    }


def _describe_phase(phase: programs.Phase) -> dict[str, Any]:
    return {
        "parts": phase.parts,
        "working": phase.working,
        "total": phase.total,
        "programs": {program.name: _describe_program(program) for program in phase.programs},
    }


def _describe_program(program: programs.Program) -> dict[str, Any]:
    report: dict[str, Any] = {"arguments": program.arguments, "needed": program.needed}
    cost = program.cost
    if cost is None:
        return report | {"failure": program.failure}
    return report | {
        "compile_seconds": round(cost.seconds, 1), "flops": cost.flops, "bytes": cost.bytes,
        "temporary": cost.temporary, "collectives": program_cost.sum_collectives_by_axes(cost),
    }  # fmt: skip


# --- time -------------------------------------------------------------------------------------


def estimate_dry_run_times(run: programs.Run) -> dict[str, Any]:
    """Estimates the seconds for each part of a step if all completions have maximum length."""
    chip, c = run.target.chip, run.frame.config
    completions = config_lib.completions_per_step(c)
    sampling = [name for name in ("rollout", "author") if name in run.phases]
    parts = {name: _estimate_sampling_seconds(run, name, completions) for name in sampling}
    if "hand-over" in run.phases:
        parts["hand-over"] = _add_seconds(_list_hand_over_programs(run), chip)
    if "step" in run.phases:
        parts["step"] = _add_seconds(run.phases["step"].programs, chip)
    known = [seconds for seconds in parts.values() if seconds is not None]
    if len(known) < len(parts):
        return {"parts": parts}
    total, tokens = sum(known), completions * c.rollout.max_tokens
    times = {"parts": parts, "total": total, "tokens_per_second": tokens / total if total else 0.0}
    if "step" in parts:
        flops = sum(p.cost.flops for p in run.phases["step"].programs if p.cost)
        seconds = parts["step"] or 0.0
        times["step_mfu"] = flops / (seconds * chip.flops) if seconds else 0.0
    return times


def _list_hand_over_programs(run: programs.Run) -> list[programs.Program]:
    """Returns the hand-over programs of each step; the program for a frozen base runs only once."""
    found, c = run.phases["hand-over"].programs, run.frame.config
    if c.train.trainable == "full" or c.sampler.merge:
        return found
    return [program for program in found if not program.name.startswith("weights")]


def _add_seconds(found: list[programs.Program], chip: hardware.Chip) -> float | None:
    """Returns the seconds that successive programs take; None if any program was not compiled."""
    total = 0.0
    for program in found:
        if program.cost is None:
            return None
        total += max(program_cost.estimate_roofline_seconds(program.cost, chip)) / EFFICIENCY
    return total


def _estimate_sampling_seconds(run: programs.Run, name: str, texts: int) -> float | None:
    """Estimates the seconds that a sampling phase takes; None if a program was not compiled.

    Prompts are prefilled in rows. Each slot decodes one text at a time, up to the maximum length.
    """
    chip, c, lengths = run.target.chip, run.frame.config, run.lengths
    asked, drawn = {
        "rollout": (lengths.student, lengths.completion), "author": (lengths.author, lengths.reply),
    }[name]  # fmt: skip
    by_name = {program.name: program for program in run.phases[name].programs}
    decode = next((p for p in by_name.values() if p.name.startswith("decode")), None)
    if decode is None or decode.cost is None:
        return None
    widths = [int(key.split()[1]) for key in by_name if key.startswith("prefill")]
    width = min(w for w in widths if w >= min(max(widths), max(c.sampler.pack, asked)))
    prefill = _add_seconds([by_name[f"prefill {width}"]], chip)
    token = _add_seconds([decode], chip)
    if token is None or prefill is None:
        return None
    shards = sharding.batch_shards(run.frame.mesh)
    prompts = texts // (c.rollout.per_prompt if name == "rollout" else 1)
    rows = math.ceil(math.ceil(prompts / shards) / max(1, width // asked))
    slots = int(decode.name.split()[1])
    steps = math.ceil(texts / slots) * drawn
    return rows * prefill + steps * token / c.sampler.steps


# --- text -------------------------------------------------------------------------------------


def summarize_dry_run(run: programs.Run, report: dict[str, Any]) -> str:
    """Returns the first sentence of the report: whether the run fits, and if not, what to do."""
    usable, where = report["usable"], f"{report['devices']} x {run.target.kind}"
    phase = max(run.phases.values(), key=lambda phase: phase.total)
    most, have = phase.total / GIB, usable / GIB
    if report["fits"]:
        return (
            f"fits: the {phase.name} needs the most memory, {most:.2f} of {have:.2f} GiB on each "
            f"device of {where}"
        )
    cure = f"; {_advise_dry_run_change(report['advice'][0])}" if report["advice"] else ""
    if most <= have:
        reason = next(phase.failure for phase in run.phases.values() if phase.failure)
        return f"does not fit: the compiler finds no room on {where}: {reason}{cure}"
    return (
        f"does not fit: the {phase.name} needs {most:.2f} GiB on each device of {where}, which has "
        f"{have:.2f}: {most - have:.2f} GiB too much{cure}"
    )


def _advise_dry_run_change(change: dict[str, Any]) -> str:
    if not change["held"]:
        return f"{change['settings']} would fit"
    held = f"{change['held'] / GIB:.2f} GiB before temporaries"
    return f"{change['settings']} would hold {held}"


def format_report(report: dict[str, Any]) -> str:
    """Returns the report as readable text."""
    caps = ", ".join(f"{name} {value}" for name, value in report["lengths"].items() if value)
    devices = f"{config_lib.spell_count(report['devices'], 'device')}, mesh {report['mesh']}"
    lines = [report["sentence"], "", f"target      {report['target']}: {devices}"]
    lines += [f"whole       {report['whole']}"] if report["whole"] else []
    lines += [f"lengths     at most: {caps}", "", "memory on each device, GiB"]
    lines += [_format_phase(name, one, report) for name, one in report["phases"].items()]
    lines += ["", "programs: FLOP, bytes, and exchanges, on each device"]
    for phase, one in report["phases"].items():
        for name, program in _select_programs(one["programs"]).items():
            lines += _format_program(f"{phase}: {name}", program)
    lines += ["", *_format_time(report["time"]), "", *_format_proposals(report)]
    lines.append(f"compiled in {report['compile_seconds']:.0f} s")
    lines.append(f"phases compiled again for the proposals: {report['compiled_again']}")
    return "\n".join(lines)


def _format_proposals(report: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in report["largest"].items():
        if name != "checked":
            size = f"{name}={value}" if value else f"no {name}"
            lines.append(f"largest useful size that fits, by the compiled sizes: {size}")
    lines += _format_checks(report["largest"])
    for change in report["advice"]:
        lines.append(
            f"{_advise_dry_run_change(change)}{'' if change['held'] else ', by the compiled sizes'}"
        )
        lines += _format_checks(change)
    return lines


def _format_checks(place: dict[str, Any]) -> list[str]:
    lines = []
    for name, one in place.get("checked", {}).items():
        state = "fits" if one["fits"] else "does not fit"
        size = f"{one['total'] / GIB:.2f} GiB"
        lines.append(f"  compiled with these settings: {name} {size}, {state}")
    return lines


def _format_phase(name: str, phase: dict[str, Any], report: dict[str, Any]) -> str:
    parts = [f"{part} {size / GIB:.2f}" for part, size in phase["parts"].items() if size]
    if not any("failure" in program for program in phase["programs"].values()):
        parts.append(f"temporaries {phase['working'] / GIB:.2f}")
    share = phase["total"] / report["usable"]
    return f"  {name:<11} {phase['total'] / GIB:8.2f} ({share:4.0%})  {', '.join(parts)}"


def _select_programs(found: dict[str, Any]) -> dict[str, Any]:
    """Returns the programs to print; omits copying programs, and all prefills except the widest."""
    buckets = [name for name in found if name.startswith("prefill")]
    quiet = (*buckets[:-1], "empty cache", *(n for n in found if n.startswith("insert")))
    return {name: program for name, program in found.items() if name not in quiet}


def _format_program(name: str, program: dict[str, Any]) -> list[str]:
    if "failure" in program:
        return [f"  {name}: {program['failure']}"]
    lines = [
        f"  {name:<34} {program['flops']:.2e} FLOP  {program['bytes'] / 1e9:10.2f} GB  "
        f"{program['temporary'] / GIB:6.2f} GiB temporary"
    ]
    for axis, kinds in program["collectives"].items():
        sent = ", ".join(f"{n} {kind} {size / 2**20:,.1f} MiB" for kind, (n, size) in kinds.items())
        lines.append(f"    over {axis or 'no axis'}: {sent}")
    return lines


def _format_time(times: dict[str, Any]) -> list[str]:
    if "total" not in times:
        return ["time: not estimated, since a program was not compiled"]
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in times["parts"].items())
    lines = [
        f"a step, by roofline at {EFFICIENCY:.0%} of the manufacturers' rates, with longest texts:"
        f" {times['total']:.2f} s ({parts}), {times['tokens_per_second']:,.0f} completion tokens/s"
    ]
    if "step_mfu" in times:
        lines.append(
            "FLOPs utilisation of the training step, padding and recomputation included: "
            f"{times['step_mfu']:.0%}"
        )
    return lines
