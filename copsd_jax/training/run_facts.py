"""The facts that run.json records at each start of a run, such as fingerprints and devices."""

import hashlib
import json

from copsd_jax.problems import problem_row
from copsd_jax.runtime import continuation, storage
from copsd_jax.training import run_plan
from copsd_jax.weights import initial_weights, tokenizer


def collect_facts(plan: run_plan.Plan) -> dict:
    """Returns the facts that run.json records at each start: devices, fingerprints and counts."""
    c, path = plan.config, plan.weights_path
    languages = {"languages_file": storage.parse_path(c.languages_file)} if c.languages_file else {}
    functions = {"reward.kind": c.reward.kind, "tokens.select": c.tokens.select}
    served = {f"root of {c.sampler.model}": plan.server.root} if plan.server else {}
    return {
        **continuation.collect_run_environment(),
        "identity": {
            "tokenizer": tokenizer.fingerprint(plan.tokenizer),
            "prompt": {"prompt.date": c.prompt.date},
            "jax": continuation.read_jax_options(),
            "languages": continuation.fingerprint_files(languages),
            "functions": continuation.fingerprint_functions(functions),
            "served": served,
        },
        "devices": [str(device) for device in plan.mesh.devices.flat],
        "seed": c.seed,
        "model": str(path),
        "model_fingerprint": initial_weights.fingerprint_base(plan.start, path, c.model.init),
        "init_fingerprint": initial_weights.fingerprint_source(plan.start),
        "data_fingerprint": problem_row.compute_fingerprint(plan.rows),
        "eval_fingerprint": problem_row.compute_fingerprint(plan.eval_rows),
        "exemplars_fingerprint": problem_row.compute_fingerprint(plan.student.exemplars),
        "author_fingerprint": _fingerprint_replies(plan.replies),
        "dropped": dict(plan.dropped),
        "eval_dropped": dict(plan.eval_dropped),
    }


def _fingerprint_replies(records: dict[tuple[str, int], str]) -> str:
    """Returns the SHA-256 of the sorted replies in author.path; "" if there are no replies."""
    text = json.dumps([[*key, reply] for key, reply in sorted(records.items())])
    return hashlib.sha256(text.encode()).hexdigest() if records else ""
