"""Workers of a search with a runner that only sleeps: several at once, killed anywhere, on a file and on PostgreSQL."""

import json
import math
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from fake_search import fake_plan, fake_runner, fake_study, score
from hydra_vlm.errors import ConfigError, DataError, RunFolderError
from hydra_vlm.liveness import Watch, claimed, heartbeat, host, is_gone, own_id, process_start
from hydra_vlm.search.journal import cut_unfinished_line
from hydra_vlm.search.samplers import distributions
from hydra_vlm.search.study import (
    Outcome,
    candidate_of,
    check_storage,
    close_storage,
    create_study,
    digest,
    finished,
    journal,
    masked,
    open_storage,
    standing,
)
from hydra_vlm.search.worker import work

SCRIPT = Path(__file__).parent / "fake_search.py"


def quiet(_: str) -> None:
    """Say nothing."""


# Worker processes


def launch(run: Path, trials: int, *words: str) -> subprocess.Popen[bytes]:
    run.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(SCRIPT), str(run), str(trials), *words]
    with (run / "output").open("ab") as output:
        worker = subprocess.Popen(command, stdout=output, stderr=output)
    LAUNCHED.append(worker)
    return worker


LAUNCHED: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def _nobody_stays_behind() -> Iterator[None]:
    """A test that fails leaves no worker that waits to be killed."""
    yield
    while LAUNCHED:
        worker = LAUNCHED.pop()
        worker.kill()
        worker.wait()


def finish(run: Path, *workers: subprocess.Popen[bytes]) -> None:
    for worker in workers:
        assert worker.wait(240) == 0, (run / "output").read_text()


def trials_of(run: Path, url: str | None = None) -> list[optuna.trial.FrozenTrial]:
    study = fake_study(fake_plan(run, 1), url)
    found = study.get_trials()
    close_storage(study._storage)
    return found


def lines(run: Path) -> list[tuple[str, str, str]]:
    found = [line.split() for line in (run / "log").read_text().splitlines()]
    return [(what, name, pid) for what, name, pid in found]


def check_finished(run: Path, n: int, url: str | None = None, trained_again: int = 0) -> None:
    """`n` finished trials of `n` candidates with the values of their records; nothing that was finished ran twice."""
    trials = trials_of(run, url)
    done = finished(trials)
    assert len(done) == len(standing(trials)) == n
    assert all(trial.state == TrialState.COMPLETE for trial in done)
    candidates = [candidate_of(trial) for trial in done]
    keys = {digest(candidate) for candidate in candidates if candidate is not None}
    assert len(keys) == n
    base = next(trial for trial in done if trial.user_attrs.get("baseline"))
    for trial, candidate in zip(done, candidates, strict=True):
        assert candidate is not None
        assert trial.user_attrs["scores"] == {"gqa": score(candidate)}
        assert trial.value == pytest.approx(score(candidate) / base.user_attrs["scores"]["gqa"])
    log = lines(run)
    for what in ("trained", "scored"):
        counts = Counter(name for kind, name, _ in log if kind == what)
        assert len(counts) == n
        assert set(counts.values()) == {1}
    starts = Counter(name for kind, name, _ in log if kind == "train")
    assert sum(starts.values()) == n + trained_again


@pytest.mark.parametrize("workers", [2, 4])
def test_several_workers_on_a_journal_file(tmp_path: Path, workers: int) -> None:
    n = 4 * workers
    finish(tmp_path, *(launch(tmp_path, n, "--together", str(workers)) for _ in range(workers)))
    check_finished(tmp_path, n)
    assert len({pid for _, _, pid in lines(tmp_path)}) == workers
    assert not list((tmp_path / "claims").glob("[!.]*"))


MOMENTS = {"training": 1, "evaluation": 0, "starting": 0, "asking": 0}
"""Where the kill falls, and how many trainings start again after it."""


def kill_when_stopped(run: Path, worker: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not (run / "stopped").exists():
        assert worker.poll() is None, (run / "output").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_only_worker_is_killed(tmp_path: Path, moment: str) -> None:
    killed = launch(tmp_path, 4, "--stop", moment)
    kill_when_stopped(tmp_path, killed)
    before = {t.number: t.values for t in finished(trials_of(tmp_path))}
    assert len(before) == (2 if moment in ("starting", "asking") else 1)
    finish(tmp_path, launch(tmp_path, 4))
    check_finished(tmp_path, 4, trained_again=MOMENTS[moment])
    after = trials_of(tmp_path)
    assert {number: after[number].values for number in before} == before
    assert [t.number for t in after] == list(range(4))


@pytest.mark.parametrize("moment", MOMENTS)
def test_one_of_two_workers_is_killed(tmp_path: Path, moment: str) -> None:
    killed, other = launch(tmp_path, 8, "--together", "2", "--stop", moment), launch(tmp_path, 8, "--together", "2")
    kill_when_stopped(tmp_path, killed)
    finish(tmp_path, other)
    check_finished(tmp_path, 8, trained_again=MOMENTS[moment])


# PostgreSQL


def server_programs() -> Path | None:
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return places[-1] if places else None


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server of its own, on a Unix socket, with nothing kept."""
    programs = server_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'hydra-vlm[postgresql]'")
    home = Path(tempfile.mkdtemp(prefix="hydra-pg-"))
    who: dict[str, Any] = {}
    if os.getuid() == 0:  # the server refuses to run as root
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        os.chown(home, owner.pw_uid, owner.pw_gid)
        who = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}

    def run(program: str, *words: str) -> None:
        with (home / "output").open("ab") as output:  # a pipe would stay open as long as the server runs
            done = subprocess.run(
                [programs / program, *words], stdout=output, stderr=output, cwd=home, check=False, **who
            )
        assert done.returncode == 0, (home / "output").read_text()

    data = str(home / "data")
    settings = f"-c listen_addresses= -c unix_socket_directories={home} -c fsync=off"
    try:
        run("initdb", "-D", data, "-U", "hydra", "--auth=trust", "--no-sync", "--encoding=UTF8", "--no-locale")
        run("pg_ctl", "-D", data, "-w", "-o", settings, "start")
        yield f"postgresql+psycopg://hydra@/postgres?host={home}"
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)


def test_two_workers_on_postgresql(tmp_path: Path, postgresql: str) -> None:
    trials_of(tmp_path, postgresql)  # made first, as `search` does before it starts workers
    finish(tmp_path, *(launch(tmp_path, 8, "--url", postgresql, "--together", "2") for _ in range(2)))
    check_finished(tmp_path, 8, postgresql)
    assert len({pid for _, _, pid in lines(tmp_path)}) == 2
    stored = json.loads((tmp_path / "study.json").read_text())
    assert stored["name"].startswith(f"search-{tmp_path.name}-")  # two runs may share a database
    assert not journal(tmp_path).exists()


@pytest.mark.parametrize("moment", ["training", "evaluation"])
def test_one_of_two_workers_on_postgresql_is_killed(tmp_path: Path, postgresql: str, moment: str) -> None:
    trials_of(tmp_path, postgresql)
    killed = launch(tmp_path, 6, "--url", postgresql, "--together", "2", "--stop", moment)
    other = launch(tmp_path, 6, "--url", postgresql, "--together", "2")
    kill_when_stopped(tmp_path, killed)
    finish(tmp_path, other)
    check_finished(tmp_path, 6, postgresql, trained_again=MOMENTS[moment])


# One worker in this process


def search(run: Path, n: int, runner: Callable[..., Outcome] | None = None, **more: Any) -> optuna.Study:
    plan = fake_plan(run, n, **more)
    study = fake_study(plan)
    work(study, plan, runner or fake_runner(run, 0.0), quiet)
    return study


def test_uniform_comes_first_and_is_worth_one(tmp_path: Path) -> None:
    study = search(tmp_path, 4)
    first = study.trials[0]
    assert first.user_attrs["baseline"]
    assert first.value == 1.0
    assert first.user_attrs["record"] == "trials/uniform-seed0"
    second = candidate_of(study.trials[1])
    assert second is not None
    assert set(second.schedule.ranks) != {8}
    assert study.trials[1].user_attrs["record"] == f"trials/{digest(second)}-seed0"
    assert all("baseline" not in trial.user_attrs for trial in study.trials[1:])
    assert all(trial.params for trial in study.trials)


def test_a_later_search_goes_on_to_more_trials(tmp_path: Path) -> None:
    before = [trial.number for trial in search(tmp_path, 1).trials]
    assert before == [0]
    search(tmp_path, 5)
    check_finished(tmp_path, 5)
    search(tmp_path, 5)
    check_finished(tmp_path, 5)


def test_values_wait_for_the_baseline(tmp_path: Path) -> None:
    """Uniform LoRA is the slowest: another worker's trials are evaluated before, and told after."""
    plan = fake_plan(tmp_path, 3)
    study = fake_study(plan)
    seen: list[list[str]] = []
    fast = fake_runner(tmp_path, 0.0)

    def runner(candidate: Any, *rest: Any) -> Outcome:
        if candidate.key == plan.starters[0].key:  # by now this process stands for two workers
            inner = fake_study(plan)
            trial = inner.ask(distributions(plan.space))
            trial.set_user_attr("worker", {"id": "elsewhere:1:1", "beat": 1})
            found = candidate_of(inner.trials[trial.number])
            assert found is not None
            trial.set_user_attr("key", digest(found))
            fast(found, 0, plan.folder(found), lambda step, loss: None)
            trial.set_user_attr("record", str(plan.folder(found).relative_to(tmp_path)))
            trial.set_user_attr("seconds", 1.0)
            trial.set_user_attr("scores", {"gqa": score(found)})
            seen.append([t.state.name for t in inner.trials])
        return fast(candidate, *rest)

    work(study, plan, runner, quiet)
    assert seen == [["RUNNING", "RUNNING"]]
    check_finished(tmp_path, 3)


def failing(run: Path, *bad: int, problem: Exception) -> Callable[..., Outcome]:
    """A runner whose runs of these numbers, from 1, fail."""
    fine = fake_runner(run, 0.0)
    runs = iter(range(1, 100))

    def runner(*words: Any) -> Outcome:
        if next(runs) in bad:
            raise problem
        return fine(*words)

    return runner


@pytest.mark.parametrize("bad", [(1, 2), (2, 3, 5)])
def test_a_failed_trial_says_why_and_the_search_goes_on(tmp_path: Path, bad: tuple[int, ...]) -> None:
    """The baseline is tried again, any other candidate is given up."""
    study = search(tmp_path, 4, failing(tmp_path, *bad, problem=DataError("no such picture")))
    failed = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert [trial.user_attrs["reason"] for trial in failed] == ["no such picture"] * len(bad)
    check_finished(tmp_path, 4)


def test_three_failures_in_a_row_end_the_worker(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such picture"):
        search(tmp_path, 4, failing(tmp_path, 2, 3, 4, problem=DataError("no such picture")))
    assert [t.state.name for t in trials_of(tmp_path)] == ["COMPLETE", "FAIL", "FAIL", "FAIL"]
    search(tmp_path, 4)
    check_finished(tmp_path, 4)


def test_an_unforeseen_error_is_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        search(tmp_path, 3, failing(tmp_path, 2, problem=ZeroDivisionError("a mistake")))
    assert trials_of(tmp_path)[1].user_attrs["reason"] == "a mistake"


def test_a_diverged_trial_fails_and_a_diverged_baseline_ends_the_search(tmp_path: Path) -> None:
    fine = fake_runner(tmp_path / "one", 0.0)
    runs = iter(range(100))

    def runner(*words: Any) -> Outcome:
        found = fine(*words)
        return replace(found, scores={"gqa": math.inf}) if next(runs) == 2 else found

    study = search(tmp_path / "one", 4, runner)
    assert [t.number for t in study.trials if t.state == TrialState.FAIL] == [2]
    assert "diverged" in study.trials[2].user_attrs["reason"]
    assert len(finished(study.trials)) == 4
    with pytest.raises(DataError, match="not finite"):
        search(tmp_path / "two", 4, lambda *words: Outcome({"gqa": math.nan}, 0.5, 1.0))


def test_an_interrupted_trial_is_taken_up(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, 3, failing(tmp_path, 2, problem=KeyboardInterrupt()))  # type: ignore[arg-type]
    assert trials_of(tmp_path)[1].state == TrialState.RUNNING
    study = search(tmp_path, 3)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    check_finished(tmp_path, 3)


def test_a_worker_that_was_silent_for_too_long_leaves_its_trial(tmp_path: Path) -> None:
    plan = fake_plan(tmp_path, 3)
    study = fake_study(plan)
    fine = fake_runner(tmp_path, 0.4)
    runs = iter(range(100))

    def runner(*words: Any) -> Outcome:
        if next(runs) == 1:  # another worker takes the running trial for dead
            [mine] = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING]
            study._storage.set_trial_user_attr(mine._trial_id, "worker", {"id": "elsewhere:1:1", "beat": 1})
            time.sleep(1.0)
        return fine(*words)

    said: list[str] = []
    work(study, plan, runner, said.append)
    assert "trial 1: taken up by another worker, as this one was silent for too long" in said
    check_finished(tmp_path, 3, trained_again=1)


def test_no_candidate_is_tried_twice_even_where_locks_do_not_work(tmp_path: Path) -> None:
    study = search(tmp_path, 2)
    study.enqueue_trial(study.trials[1].params, user_attrs={"candidate": study.trials[1].user_attrs["candidate"]})
    search(tmp_path, 4)
    assert study.trials[2].user_attrs["reason"] == "duplicate"
    check_finished(tmp_path, 4)


def test_the_pruner_ends_hopeless_trials_but_never_the_baseline(tmp_path: Path) -> None:
    plan = fake_plan(tmp_path, 6, prunes=True)
    study = fake_study(plan, pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    runs = iter(range(100))

    def runner(candidate: Any, seed: int, folder: Path, progress: Callable[[int, float], None]) -> Outcome:
        loss = 9.0 if next(runs) in (0, 3, 4) else 1.0 + len(str(folder)) / 1e6
        progress(10, math.nan)
        progress(10, loss)
        return Outcome({"gqa": score(candidate)}, loss, 0.1)

    work(study, plan, runner, quiet)
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED", "PRUNED", "COMPLETE"]
    assert study.trials[3].user_attrs.get("reason") is None


# Who is alive


def test_a_heartbeat_that_stops_is_noticed_by_the_observers_clock() -> None:
    now = 0.0
    watch = Watch(10.0, lambda: now)
    mute = {"id": "elsewhere:1:1", "beat": 5}
    assert not watch.is_dead("mute", mute)
    assert not watch.is_dead("silent", None)
    for now in (5.0, 10.0):
        assert not watch.is_dead("mute", mute)
        assert not watch.is_dead("alive", {"id": "elsewhere:2:2", "beat": now})
    now = 10.5
    assert watch.is_dead("mute", mute)
    assert watch.is_dead("silent", None)
    assert not watch.is_dead("alive", {"id": "elsewhere:2:2", "beat": now})
    assert not watch.is_dead("mute", {"id": "elsewhere:1:1", "beat": 6})


def test_a_process_of_this_host_that_ended_is_dead_at_once() -> None:
    process = subprocess.Popen(["sleep", "60"])
    name = f"{host()}:{process.pid}:{process_start(process.pid)}"
    assert not is_gone(name)
    assert not is_gone(own_id())
    assert is_gone(f"{host()}:{process.pid}:1")  # the number was given to another process
    assert not is_gone(f"elsewhere:{process.pid}:1")
    process.kill()
    deadline = time.monotonic() + 5
    while not is_gone(name) and time.monotonic() < deadline:  # before its parent has asked after it
        time.sleep(0.01)
    assert is_gone(name)
    process.wait()
    assert is_gone(name)
    assert Watch(60.0).is_dead("it", {"id": name, "beat": 1})


@pytest.mark.parametrize("alive", [False, True])
def test_a_trial_of_another_machine_is_taken_up_only_when_its_heartbeat_stops(tmp_path: Path, alive: bool) -> None:
    study = search(tmp_path, 1)
    study.enqueue_trial({}, user_attrs={"candidate": fake_plan(tmp_path, 1).starters[1].to_json()})
    trial = study.ask()
    done = threading.Event()

    def beat() -> None:
        number = 0
        while not done.wait(0.1):
            number += 1
            trial.set_user_attr("worker", {"id": "elsewhere:1:1", "beat": number})
            if number == 15:
                trial.set_user_attr("seconds", 1.0)
                trial.set_user_attr("scores", {"gqa": 50.0})
                return

    trial.set_user_attr("worker", {"id": "elsewhere:1:1", "beat": 0})
    thread = threading.Thread(target=beat)
    if alive:
        thread.start()
    try:
        search(tmp_path, 3, grace=0.6)
    finally:
        done.set()
        if alive:
            thread.join()
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    assert (study.trials[1].user_attrs["worker"]["id"] == own_id()) is not alive


def test_a_claim_is_had_by_one_and_inherited_from_the_dead(tmp_path: Path) -> None:
    path, watch = tmp_path / "claims/it", Watch(0.5)
    with claimed(path, watch) as mine:
        assert mine
        with claimed(path, watch) as again:
            assert not again
        first = path.read_text()
        time.sleep(0.8)
        assert path.read_text() != first  # it beats
        with claimed(path, watch) as again:
            assert not again
    assert not path.exists()
    path.write_text(json.dumps({"id": f"{host()}:{os.getpid()}:1", "beat": 1}))
    with claimed(path, watch) as mine:
        assert mine
    path.write_text("")  # its taker was killed before it wrote its name
    with claimed(path, watch) as mine:
        assert not mine
    time.sleep(0.6)
    with claimed(path, watch) as mine:
        assert mine
    assert heartbeat() != heartbeat()


# The journal and other storages


def test_a_half_written_line_is_cut_off_and_nothing_else(tmp_path: Path) -> None:
    search(tmp_path, 2)
    path = journal(tmp_path)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"op_code": 8, "worker_id": "' + b"x" * 10_000)
    study = search(tmp_path, 3)
    assert path.read_bytes().startswith(whole)
    assert b"xxx" not in path.read_bytes()
    assert len(finished(study.trials)) == 3
    for content, kept in ((b"", b""), (b"{", b""), (b'a\n{"op', b"a\n"), (b"a\n", b"a\n"), (b"a\nb", b"a\nb\n")):
        path.write_bytes(content)
        cut_unfinished_line(path)
        assert path.read_bytes() == kept


def test_optunas_own_api_reads_the_study(tmp_path: Path) -> None:
    expected = search(tmp_path, 3).best_value
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
    study = optuna.load_study(study_name="search", storage=storage)
    assert study.best_value == expected
    assert len(study.trials_dataframe(attrs=("number", "value"))) == 3 if has_pandas() else len(study.trials) == 3


def has_pandas() -> bool:
    try:
        import pandas  # noqa: F401
    except ImportError:
        return False
    return True


def test_optuna_dashboard_shows_the_study(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("optuna-dashboard")
    if not program.exists():
        pytest.skip("optuna-dashboard is not installed: pip install 'hydra-vlm[dashboard]'")
    search(tmp_path, 3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "dashboard").open("wb") as output:
        command = [str(program), str(journal(tmp_path)), "--port", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        listed = ask(server, f"http://127.0.0.1:{port}/api/studies", tmp_path / "dashboard")
        [shown] = listed["study_summaries"]
        assert shown["study_name"] == "search"
        detail = ask(server, f"http://127.0.0.1:{port}/api/studies/{shown['study_id']}", tmp_path / "dashboard")
        assert [trial["state"] for trial in detail["trials"]] == ["Complete"] * 3
    finally:
        server.terminate()
        server.wait()


def ask(server: subprocess.Popen[bytes], url: str, output: Path) -> Any:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.loads(answer.read())
        except OSError:
            assert server.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///study.db", "SQLite file, which loses updates"),
        ("study.db", "SQLite file, which loses updates"),
        ("mysql://u:secret@host/db", "no PostgreSQL URL"),
        ("nowhere", "no PostgreSQL URL"),
        ("postgresql://u:secret@127.0.0.1:1/db", "cannot be opened"),
        ("postgresql+psycopg://u:secret@[::1/db", "cannot be opened"),
    ],
)
def test_storages_that_do_not_do_are_refused_without_the_password(tmp_path: Path, url: str, message: str) -> None:
    if url.startswith("postgresql"):
        pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'hydra-vlm[postgresql]'")
    with pytest.raises(ConfigError, match=message) as caught:
        open_storage(tmp_path, url)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_password_is_masked_and_short_forms_are_completed() -> None:
    assert masked("postgresql://me:p@ss:w@host:5432/db") == "postgresql://me@host:5432/db"
    assert masked("postgresql://me@host/db") == "postgresql://me@host/db"
    assert check_storage("postgres://me@host/db") == "postgresql+psycopg://me@host/db"


def test_a_study_stays_where_it_is_and_what_it_is(tmp_path: Path) -> None:
    study = search(tmp_path, 1)
    with pytest.raises(RunFolderError, match="journal file"):
        create_study(tmp_path, study._storage, "postgresql+psycopg://me@host/db", 1)
    with pytest.raises(RunFolderError, match="1 values"):
        create_study(tmp_path, study._storage, None, 2)
