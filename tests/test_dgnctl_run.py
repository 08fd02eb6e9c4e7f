"""`dgnctl run`: its options, its JSON, streaming, Ctrl-C, a stdout that nobody reads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from echo_service import PEER, EchoDaemon

from dgnctl.cli import run_command
from dgnd.control import api

DGNCTL = (sys.executable, "-m", "dgnctl")


def spawn(*args: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*DGNCTL, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def until_cancelled(daemon: EchoDaemon) -> int:
    end = time.monotonic() + 10
    while not daemon.service.cancelled:
        assert time.monotonic() < end, "the generation was not cancelled"
        time.sleep(0.01)
    return daemon.service.cancelled[0]


def test_the_text_is_on_stdout_and_ends_with_a_newline(
    daemon: EchoDaemon, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["run", "one two"]) == 0
    assert capfd.readouterr() == ("one two \n", "")


def test_json_is_one_line_with_the_fixed_keys(daemon: EchoDaemon, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", "--json", "one two"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    found = json.loads(out)
    assert list(found) == [
        "text", "token_ids", "prompt_token_ids", "finish_reason", "exact", "usage", "timings", "route",
    ]  # fmt: skip
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 2}
    assert list(found["timings"]) == ["prefill_s", "decode_s", "ttft_s"]
    assert found["route"][0] == {"peer": PEER, "name": "desk", "span": "embed,0-3"}


def test_every_option_reaches_the_daemon(daemon: EchoDaemon) -> None:
    options = [
        "--model", "tiny", "--system", "be brief", "--max-tokens", "5", "--temperature", "0.5",
        "--top-p", "0.9", "--top-k", "40", "--min-p", "0.1", "--repetition-penalty", "1.1",
        "--presence-penalty", "-0.5", "--frequency-penalty", "0.25", "--seed", "18446744073709551615",
        "--stop", "END", "--stop", "\n", "--stop-ids", "13,2", "--stop-ids", "7", "--json",
    ]  # fmt: skip
    assert run_command(["run", *options, "hello"]) == 0
    assert daemon.service.seen == [
        api.GenerateParams(
            prompt="hello", model="tiny", system="be brief", max_tokens=5, temperature=0.5,
            top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.1, presence_penalty=-0.5,
            frequency_penalty=0.25, seed=2**64 - 1, stop=["END", "\n"], stop_ids=[[13, 2], [7]],
        )
    ]  # fmt: skip


def test_every_parameter_of_generate_has_its_option() -> None:
    from dgnctl.run import run

    options = {param.name for param in run.params}
    # What takes a conversation of several messages, or a program that reads what comes back.
    not_of_the_command_line = {"messages", "token_ids", "session", "resume", "logprobs"}
    not_of_the_command_line |= {"tools", "tool_choice", "tool_name", "parallel_tool_calls"}
    assert set(api.GenerateParams.__struct_fields__) - not_of_the_command_line <= options


@pytest.mark.parametrize(
    ("options", "said", "sent"),
    [
        ((), b"two\nlines\n", "two\nlines"),
        ((), "ünï".encode(), "ünï"),
        (("--raw",), b"kept\n", "kept\n"),
    ],
)
def test_a_dash_reads_stdin(daemon: EchoDaemon, options: tuple[str, ...], said: bytes, sent: str) -> None:
    with spawn("run", *options, "-", stdin=subprocess.PIPE) as process:
        process.communicate(said)
    assert process.returncode == 0
    assert daemon.service.seen[0].prompt == sent


def test_stdin_that_is_not_utf8_is_refused(daemon: EchoDaemon) -> None:
    with spawn("run", "--json", "-", stdin=subprocess.PIPE) as process:
        out, _ = process.communicate(b"\xff")
    assert process.returncode == 2
    assert "not UTF-8" in json.loads(out)["error"]["message"]
    assert not daemon.service.seen


def test_raw_reaches_the_daemon(daemon: EchoDaemon) -> None:
    assert run_command(["run", "--raw", "hello"]) == 0
    assert daemon.service.seen == [api.GenerateParams(prompt="hello", raw=True)]


def test_a_system_message_that_no_template_would_take_is_refused(daemon: EchoDaemon) -> None:
    done = subprocess.run([*DGNCTL, "run", "--raw", "--system", "Be brief.", "a"], capture_output=True)
    assert done.returncode == 2
    assert b"--raw uses no template, which --system needs" in done.stderr
    assert not daemon.service.seen


def test_an_argument_that_is_not_text_is_refused(daemon: EchoDaemon) -> None:
    done = subprocess.run(
        [*DGNCTL, "run", b"a\xff"], capture_output=True, env={**os.environ, "PYTHONUTF8": "1"}
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"dgnctl: the prompt is not valid text")


def test_an_error_after_half_an_answer(daemon: EchoDaemon, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", "died"]) == 7
    out, err = capfd.readouterr()
    assert out == "half \n"
    assert err == "dgnctl: the worker of tiny died (signal 9); it is restarted\n"
    assert run_command(["run", "--json", "died"]) == 7
    out, err = capfd.readouterr()
    assert err == ""
    assert json.loads(out)["error"]["kind"] == "worker_died"


def test_not_ready_is_retryable_and_fails_at_once(
    daemon: EchoDaemon, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["run", "--json", "missing"]) == 5
    error = json.loads(capfd.readouterr().out)["error"]
    assert error == {
        "code": -32021,
        "kind": "blocks_missing",
        "message": "tiny: nobody serves blocks 4-7",
        "data": {"missing": "4-7", "retryable": True},
    }


@pytest.mark.parametrize("wait", [(), ("--wait", "9")])
def test_what_is_said_of_nodes_that_are_lacking_fits_the_moment(
    daemon: EchoDaemon, capfd: pytest.CaptureFixture[str], wait: tuple[str, ...]
) -> None:
    assert run_command(["run", *wait, "missing"]) == 5
    assert capfd.readouterr().err == "dgnctl: tiny: nobody serves blocks 4-7" + (
        "\n" if wait else " (to wait for it: --wait 60)\n"
    )
    assert run_command(["run", *wait, "lost"]) == 5  # to wait at its beginning would not help it
    out, err = capfd.readouterr()
    assert out == "half \n"
    assert "--wait" not in err
    assert "recover_s under [sessions]" in err
    assert "in dgnctl chat it can be gone on with" in err


def test_a_full_context_is_said(daemon: EchoDaemon, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", "full"]) == 0
    assert "context is full" in capfd.readouterr().err


def test_wait_waits_for_a_daemon_to_start(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with spawn("run", "--socket", str(path), "--wait", "30", "late") as process:
        time.sleep(1)
        assert process.poll() is None
        with EchoDaemon(path) as daemon:
            assert process.communicate()[0] == b"late \n"
            assert 0 < daemon.service.seen[0].wait < 30
    assert process.returncode == 0


def test_ctrl_c_cancels_and_prints_what_came(daemon: EchoDaemon) -> None:
    with spawn("run", "slow") as process:
        assert process.stdout is not None
        first = process.stdout.read(3)  # it streams: this is long before the end
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + out).startswith(b"w0 ")
    assert out.endswith(b"\n")
    assert err == b""
    assert (first + out).split()[-1] == b"w%d" % (until_cancelled(daemon) - 1)


def test_ctrl_c_under_json_prints_the_cancelled_result(daemon: EchoDaemon) -> None:
    with spawn("run", "--json", "slow") as process:
        while not daemon.service.seen:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(out)["finish_reason"] == "cancelled"


def test_a_reader_that_left_cancels_quietly(daemon: EchoDaemon) -> None:
    with spawn("run", "slow") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(3)
        process.stdout.close()
        assert process.wait(10) == 141
        assert process.stderr.read() == b""
    assert until_cancelled(daemon) < 100


def test_a_reader_that_left_cancels_also_before_the_first_text(daemon: EchoDaemon) -> None:
    with spawn("run", "--json", "slow") as process:  # --json writes nothing until the end
        assert process.stdout is not None
        while not daemon.service.seen:
            time.sleep(0.01)
        process.stdout.close()
        assert process.wait(10) == 141
    assert until_cancelled(daemon) < 100


def test_a_killed_client_cancels(daemon: EchoDaemon) -> None:
    with spawn("run", "slow") as process:
        assert process.stdout is not None
        process.stdout.read(3)
        process.kill()
    assert until_cancelled(daemon) < 100


def test_stdout_that_is_closed_from_the_start(daemon: EchoDaemon) -> None:
    done = subprocess.run(f"{sys.executable} -m dgnctl run hello >&-", shell=True, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("options", "prompt", "said"),
    [
        (
            ["--max-tokens", str(10**20)],
            "hi",
            f"max_tokens is {10**20}; it must be between 1 and 9223372036854775807",
        ),
        (["--max-tokens", "9" * 5000], "hi", "--max-tokens"),
        (["--top-k", str(10**10)], "hi", "top_k is 10000000000; it must be between 0 and 2147483647"),
        (["--temperature", "1e300"], "hi", "temperature is 1e+300; it must be between 0 and 100"),
        (["--wait", "86401"], "hi", "Invalid value for '--wait': 86401.0 is not in the range 0<=x<=86400."),
        (
            [],
            "x" * 4_500_000,
            " bytes, and dgnd reads at most 4,194,304 at once; give less",
        ),
    ],
    ids=["max_tokens", "digits", "top_k", "temperature", "wait", "prompt"],
)
def test_numbers_and_prompts_beyond_all_bounds(
    daemon: EchoDaemon, options: list[str], prompt: str, said: str
) -> None:
    asked = subprocess.run(
        [*DGNCTL, "run", *options, "-"], input=prompt, capture_output=True, text=True, check=False, timeout=60
    )
    assert (asked.returncode, asked.stdout) == (2, "")
    assert said in asked.stderr
    assert asked.stderr.count("\n") in (1, 4)  # with click's hint
