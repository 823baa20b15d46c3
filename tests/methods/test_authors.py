"""Who writes a context, end to end: a critic over HTTP that fails in every way, a file, and what a
run says of it.

Oracle: what the stub server was told to do with each attempt, counted by hand.
"""

import http.server
import json
import threading

import pytest
import runs
from test_methods import one_device, right, row_with, script

from copsd_jax import main, summary
from copsd_jax.config import settings as config_lib
from copsd_jax.methods import authors, distill, table
from copsd_jax.teaching import contexts, replies
from copsd_jax.teaching.conversations import Section, Turn
from copsd_jax.training import run_plan

optax_promotes = runs.optax_promotes
one_device = one_device


class _Critic(http.server.BaseHTTPRequestHandler):
    """Does what the attempt's last word says; the prompt holds the attempt between its fences."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        attempt = body["messages"][-1]["content"].split("Attempt begins ---\n")[1]
        word = attempt.split("\n--- Attempt ends")[0].split()[-1]
        self.server.asked.append(word)
        if word == "silent":
            return self.server.ending.wait(20)
        if word == "broken":
            return self.send_error(500)
        text = self.server.replies.get(word, "I would rather not.")
        finish = "length" if word == "endless" else "stop"
        choice = {"message": {"content": text}, "finish_reason": finish}
        data = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if word == "half" else data)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def critic():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Critic)
    server.asked, server.replies, server.ending = [], {}, threading.Event()
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.ending.set()
    server.shutdown()
    server.server_close()


def settings(server, tmp_path):
    return {
        "author__kind": "server", "author__url": f"http://127.0.0.1:{server.server_port}/v1",
        "author__model": "critic", "author__timeout": 1.5, "author__retries": 1,
        "author__backoff": 0.01, "author__cache": tmp_path / "cache", "train__batch": 6,
        "prompt__form": "plain",
    }  # fmt: skip


GOOD = """<case>wrong</case><first_wrong>1</first_wrong><step_1>{}</step_1><answer>{}</answer>"""


@pytest.mark.slow
def test_a_critic_that_fails_in_every_way(monkeypatch, tmp_path, critic):
    words = ["fine", "silent", "broken", "half", "chatty", "quoting"]
    expected = ["ok", "timeout", "server_error", "bad_reply", "no_case", "quotes_error"]
    with runs.loaded("critique", **settings(critic, tmp_path)) as (r, state):
        row = row_with(r, 1)
        critic.replies = {
            "fine": GOOD.format(row.solution, row.answer),
            "quoting": GOOD.format("not 1 + 1 = 3 quoting", row.answer),
        }
        attempts = [f"1 + 1 = 3 {word}" for word in words]
        script(monkeypatch, attempts, attempts)
        work = distill.make_batch(r, state, [row] * 6, 0)
        first = list(critic.asked)
        again = distill.make_batch(r, state, [row] * 6, 0)
    found = [record["reply_status"] for record in work.records]
    assert found[:3] + found[4:] == expected[:3] + expected[4:]
    assert found[3] in ("bad_reply", "unreachable")  # half a reply, with or without a reset
    counted = {k: v for k, v in work.metrics.items() if k.startswith("reply_")}
    assert sum(counted.values()) == 6
    assert counted["reply_ok"] == work.metrics["taught"] == 1
    # Each failure was tried twice, and what had been answered is not asked again.
    assert sorted(first) == sorted([*words, "silent", "broken", "half"])
    assert sorted(critic.asked[len(first) :]) == sorted(["silent", "broken", "half"] * 2)
    assert [record["reply_status"] for record in again.records] == found
    # Where there is no critique there is no loss; the run goes on.
    assert work.batch.loss_BC.any(axis=1).tolist() == [status == "ok" for status in found]
    assert row.solution in work.records[0]["teacher_prompt"]
    assert "1 + 1 = 3" not in work.records[0]["teacher_prompt"]
    # Why there is none is in the records, and in one line a step; what was written is kept.
    details = [record["reply_detail"] for record in work.records]
    assert details[2].startswith("HTTP 500")
    assert [bool(detail) for detail in details] == [False, True, True, True, False, False]
    assert summary.summarize_failures(7, work.records) == [
        "warning: step 7: 3 of 6 completions have no reply; the first has the status timeout: "
        "no complete reply within 1.5 s (author.timeout)"
    ]
    assert summary.summarize_failures(7, work.records[:1]) == []
    assert "quoting" in work.records[5]["reply"]


def test_a_server_that_cuts_or_is_shown_less(monkeypatch, tmp_path, critic):
    """A cut critique is lost to the teacher, not to the record; a shortened attempt is counted and
    the critique held against what was shown."""
    with runs.loaded("critique", **settings(critic, tmp_path)) as (r, _):
        row = row_with(r, 2)
        first, second = row.solution.rstrip(".").split(" and ")
        limit = len(r.plan.tokenizer.encode(f"{first}.", add_special_tokens=False))
    change = {"train__batch": 2, "context__section_tokens": limit}
    with runs.loaded("critique", **settings(critic, tmp_path) | change) as (r, state):
        said = f"<case>right</case><step_1>{first}.</step_1><answer>{row.answer}</answer>"
        critic.replies = {"endless": said, f"{first}.".split()[-1]: said}
        long = f"{first}. {second}. \\boxed{{{row.answer}}}"
        script(monkeypatch, ["endless", long])
        work = distill.make_batch(r, state, [row, row], 0)
    assert [record["reply_status"] for record in work.records] == ["cut", "ok"]
    assert [record["reply_cut"] for record in work.records] == [True, False]
    assert work.records[0]["reply"] == said
    assert work.metrics["shortened_attempt"] == 1


def test_replies_from_a_file(monkeypatch, tmp_path):
    path = tmp_path / "replies.jsonl"
    with runs.loaded("critique") as (r, _):
        row = row_with(r, 1)
    good = GOOD.format(row.solution, row.answer)
    path.write_text(json.dumps({"id": row.id, "sample": 1, "reply": good}) + "\n")
    with runs.loaded(
        "critique", author__kind="file", author__path=path, prompt__form="plain",
        rollout__per_prompt=2, train__batch=1,
    ) as (r, state):  # fmt: skip
        script(monkeypatch, ["1 + 1 = 3.", "1 + 1 = 3."])
        work = table.METHODS["distill"].make_batch(r, state, [row], 0)
    assert [record["reply_status"] for record in work.records] == ["missing", "ok"]
    assert work.metrics["reply_missing"] == 1


def test_contexts_and_settings_name_the_authors_of_the_table():
    named = {kind for context in contexts.CONTEXTS.values() for kind in context.author_kinds}
    assert named == {"none", *authors.AUTHORS}
    for setting in config_lib.SETTINGS.values():
        for words in (getattr(when, "words", "") for when in setting.read_when):
            if words.startswith("author.kind="):
                assert set(words.removeprefix("author.kind=").split(" or ")) <= set(authors.AUTHORS)


def user(*parts):
    return (Turn("user", tuple(Section(*part.split("|")) for part in parts)),)


HINT = contexts.Context(
    lambda settings, attempt, reply: user("problem", f"reflection|{reply.text}", "instruction"),
    inputs=lambda settings: ("reply", "attempt"),
    author=contexts.Author(
        lambda settings, attempt: user("problem", f"attempt|{attempt.text}"),
        lambda settings, attempt, text: replies.Reply("ok", f"Hint: {text}"),
        kinds=tuple(authors.AUTHORS),
        write_by_rule=lambda attempt, found: f"not {found}",
    ),
)


@pytest.mark.parametrize("kind", authors.AUTHORS)
def test_a_new_context_with_an_author_is_one_entry(monkeypatch, tmp_path, critic, kind):
    """Every kind of author writes for a context that is in no other file."""
    monkeypatch.setitem(contexts.CONTEXTS, "hint", HINT)
    row = run_plan.make_plan(runs.config("opsd")).rows[0]
    path = tmp_path / "replies.jsonl"
    path.write_text(json.dumps({"id": row.id, "reply": "not 3"}) + "\n")
    critic.replies = {"\\boxed{3}": "not 3"}
    chosen = {"file": {"author__path": path}, "server": settings(critic, tmp_path)}.get(kind, {})
    chosen |= {"train__batch": 1, "author__kind": kind, "author__max_tokens": 64}
    with runs.loaded("opsd", **chosen, context__kind="hint") as (r, state):
        asked = script(monkeypatch, ["\\boxed{3}"], ["not 3"])
        work = distill.make_batch(r, state, [row], 0)
    assert [record["reply_status"] for record in work.records] == ["ok"]
    assert "Hint: not 3" in work.records[0]["teacher_prompt"]
    assert work.batch.loss_BC.any()
    assert len(asked) == (2 if kind in ("student", "teacher") else 1)
    assert critic.asked == ["\\boxed{3}"] * (kind == "server")


def test_the_same_problem_of_a_critic_that_agrees(monkeypatch, tmp_path, critic):
    """A right attempt is handed back verbatim, and taught whole."""
    with runs.loaded("critique", **settings(critic, tmp_path) | {"train__batch": 1}) as (r, state):
        row = row_with(r, 1)
        said = f"<case>right</case><step_1>{row.solution}</step_1><answer>{row.answer}</answer>"
        text = right(row)
        critic.replies = {text.split()[-1]: said}
        script(monkeypatch, [text])
        work = distill.make_batch(r, state, [row], 0)
    assert work.records[0]["reply_status"] == "ok"
    assert (work.batch.loss_BC == work.batch.mask_BC).all()


@pytest.mark.slow
def test_a_guard_ends_the_run_with_its_reason(tmp_path, capsys):
    workdir = tmp_path / "w"
    argv = runs.argv("opsd", workdir, train__steps=5, eval__limit=2)
    argv.append("--config.guards.rules=truncated>-1@2:stop,loss>-1e9:warn")
    assert main.main(argv) == 0
    out = capsys.readouterr().out
    last = out.strip().splitlines()[-1]
    assert last.startswith("stopped by a guard: step 2: truncated is")
    assert "guard: step 1: loss is" in out
    events = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["action"]) for event in events] == [(1, "warn"), (2, "stop")]
    assert last == f"stopped by a guard: {events[1]['text']}"
    assert [line["step"] for line in runs.steps_of(workdir)] == [1, 2]
    assert (workdir / "eval/step_000002.json").is_file()
    # The same command again adds nothing and says why.
    assert main.main(argv) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == last
    assert len(runs.steps_of(workdir)) == 2


@pytest.mark.slow
def test_a_guard_lowers_the_learning_rate(tmp_path):
    workdir = tmp_path / "w"
    argv = runs.argv("opsd", workdir, train__steps=3, train__schedule="constant", eval__limit=2)
    argv.append("--config.guards.rules=loss>-1e9:lr*0.5")
    assert main.main(argv) == 0
    rates = [line["learning_rate"] for line in runs.steps_of(workdir)]
    assert rates == pytest.approx([1e-3, 5e-4, 2.5e-4])
