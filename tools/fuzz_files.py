"""Reads altered files by the million: each must load or be refused, in time and within memory.

python tools/fuzz_files.py [--files N | --seconds N] [--seed N] [--processes N] [--native FILE]

Mutants are numbered, and each depends on its number and the seed alone, not on the processes. What
no reader may do is written to build/fuzz-findings/ with its number; --only reads that one again.
"""

import argparse
import importlib.util
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]

FINDINGS = ROOT / "build" / "fuzz-findings"
HANGS = 60
"""Seconds of the processor on one mutant, or 20 times as many on the clock, that end a process."""
MOST_FINDINGS = 20
MOST_SPACE = 3 * 2**30
_OUTCOMES = 6
_STATE = struct.Struct(f"<{_OUTCOMES}QQQ")
"""Count of each outcome, number of the mutant being read, its length; then its bytes."""
_ROOM = 2**20
SANITIZERS = {
    # torch and Python free at exit what they like, and are not what is examined.
    "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0:"
    "allocator_may_return_null=1:quarantine_size_mb=8:malloc_context_size=3",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


class Progress:
    """What a process has done so far, where others see it even after it has crashed."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_ROOM))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _ROOM)

    @property
    def state(self) -> bytes:
        """What changes as soon as another mutant is read."""
        return self._map[: _STATE.size]

    @property
    def counts(self) -> list[int]:
        """Of each outcome."""
        return list(_STATE.unpack_from(self._map))[:_OUTCOMES]

    @property
    def number(self) -> int:
        """Of the mutant that is being read."""
        return int(_STATE.unpack_from(self._map)[_OUTCOMES])

    @property
    def content(self) -> bytes:
        """Its bytes."""
        length = _STATE.unpack_from(self._map)[_OUTCOMES + 1]
        return self._map[_STATE.size : _STATE.size + length]

    def begin(self, number: int, content: bytes) -> None:
        """Notes a mutant before it is read."""
        content = content[: _ROOM - _STATE.size]
        struct.pack_into("<QQ", self._map, 8 * _OUTCOMES, number, len(content))
        self._map[_STATE.size : _STATE.size + len(content)] = content

    def count(self, outcome: int) -> None:
        """Notes what came of it."""
        struct.pack_into("<Q", self._map, 8 * outcome, self.counts[outcome] + 1)


def keep(number: int, seed: int, content: bytes, what: str) -> None:
    """Writes a finding, and says so."""
    FINDINGS.mkdir(parents=True, exist_ok=True)
    path = FINDINGS / f"{seed}-{number}.tersor"
    path.write_bytes(content)
    path.with_suffix(".txt").write_text(what + "\n", encoding="utf-8")
    print(f"mutant {number} of seed {seed} {what}", file=sys.stderr, flush=True)


def processor_seconds(process: int) -> float:
    """What a process has used so far; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def sanitized() -> Path | None:
    """The compiled coders that `make fuzz` builds with sanitizers, where that was possible."""
    return next((ROOT / "build" / "sanitized").glob("tersor/codec/coders/_native*.so"), None)


def libraries(native: Path) -> list[str]:
    """Those of the sanitizers, which must be in a process before anything else."""
    said = subprocess.run(["ldd", native], check=True, capture_output=True, text=True).stdout
    words = [line.split() for line in said.splitlines() if "san.so" in line]
    return [line[2] for line in words if len(line) > 2]


def use_native(path: Path) -> None:
    """Lets tersor use this build of its compiled coders."""
    from tersor.codec import coders

    name = "tersor.codec.coders._native"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no extension")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    coders._native = module  # type: ignore[attr-defined]
    if coders.native.native() is not module:
        raise SystemExit(f"{path} came too late: other coders are in use")


def work(options: argparse.Namespace) -> None:
    """Reads mutants first, first + step, ... in this process."""
    if options.native:
        use_native(options.native)
    from fuzz_judge import OUTCOMES, Finding, Judge
    from fuzz_mutants import Mutants
    from fuzz_seeds import read_seeds

    seeds = read_seeds(options.folder)
    mutants = Mutants(seeds, options.seed)
    judge = Judge(seeds, MOST_SPACE)
    progress = Progress(options.progress)
    number, ends = options.first, time.monotonic() + options.seconds
    while number < options.files and time.monotonic() < ends:
        mutant = mutants.make(number)
        progress.begin(number, mutant.content)
        try:
            found = judge.outcome(mutant, number)
        except Finding as finding:
            found = OUTCOMES[-1]
            keep(number, options.seed, mutant.content, f"({mutant.seed}: {mutant.how}) {finding}")
        progress.count(OUTCOMES.index(found))
        if progress.counts[-1] >= MOST_FINDINGS:
            break
        number += options.step


class Worker:
    """A process that reads every `step`-th mutant, and is started again after a crash."""

    def __init__(self, options: argparse.Namespace, folder: Path, index: int) -> None:
        self._options, self._folder = options, folder
        self._path = folder / f"progress-{index}"
        self.progress = Progress(self._path)
        self.crashes = 0
        self._ends = time.monotonic() + options.seconds
        self._start(index)

    def _start(self, first: int) -> None:
        own = self._options
        command = [sys.executable, __file__, "--progress", str(self._path), "--first", str(first)]
        command += ["--folder", str(self._folder), "--step", str(own.processes)]
        command += ["--files", str(own.files), "--seed", str(own.seed)]
        command += ["--seconds", str(max(0.0, self._ends - time.monotonic()))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if own.native:
            command += ["--native", str(own.native)]
            environment |= SANITIZERS | {"LD_PRELOAD": " ".join(libraries(own.native))}
        self._process = subprocess.Popen(command, env=environment)
        self._seen, self._since, self._used = b"", time.monotonic(), 0.0

    def busy(self) -> bool:
        """Whether it goes on; what crashed or hangs is kept as a finding."""
        code = self._process.poll()
        if code == 0:
            return False
        if code is None:
            used = processor_seconds(self._process.pid)
            if self.progress.state != self._seen:
                self._seen, self._since, self._used = self.progress.state, time.monotonic(), used
            if used - self._used < HANGS and time.monotonic() - self._since < 20 * HANGS:
                return True
            self._process.kill()
            self._process.wait()
        number, content = self.progress.number, self.progress.content
        if not content:
            raise SystemExit(f"a process ended with {code} before it read a file")
        what = f"ended the process with {code}"
        if code is None:
            what = f"took more than {HANGS} s of the processor, or hangs"
        keep(number, self._options.seed, content, what)
        self.crashes += 1
        if self.crashes >= MOST_FINDINGS:
            return False
        self._start(number + self._options.processes)
        return True

    def stop(self) -> None:
        """Ends it."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def run(options: argparse.Namespace) -> int:
    """Shares the mutants out to processes. Returns the number of findings."""
    from fuzz_seeds import write_seeds

    with TemporaryDirectory() as name:
        write_seeds(Path(name))
        begin = time.monotonic()
        workers = [Worker(options, Path(name), index) for index in range(options.processes)]
        try:
            while sum(worker.busy() for worker in workers):
                time.sleep(0.2)
        except KeyboardInterrupt:
            print("stopped before the end" + ", and not recorded" * options.record)
            options.record = False
        finally:
            for worker in workers:
                worker.stop()
        seconds = time.monotonic() - begin
        totals = [sum(column) for column in zip(*(w.progress.counts for w in workers), strict=True)]
    totals[-1] += sum(worker.crashes for worker in workers)
    report(options, totals, seconds)
    return totals[-1]


def report(options: argparse.Namespace, totals: list[int], seconds: float) -> None:
    """Prints how many files came to which end and how fast, and records it if asked to."""
    from fuzz_judge import OUTCOMES

    counts = dict(zip(OUTCOMES, totals, strict=True))
    files = sum(totals)
    built = "AddressSanitizer and UBSan" if options.native else "no sanitizers"
    print(f"{files} files in {seconds:.0f} s with {built}: ", end="")
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    each = files / max(0.01, used.ru_utime + used.ru_stime)
    print(f"{files / seconds:.0f} a second, {each:.0f} for each second of a processor")
    if options.record:
        sys.path.append(str(ROOT / "bench"))
        from _record import record

        figures = {"files": files, "outcomes": counts, "seconds": round(seconds)}
        figures |= {"files_per_second": round(files / seconds), "processes": options.processes}
        figures["files_per_processor_second"] = round(each)
        record("fuzz", figures | {"seed": options.seed, "built_with": built})


def once(options: argparse.Namespace) -> int:
    """Reads one mutant in this process, with its traceback if it is a finding."""
    from fuzz_judge import Judge
    from fuzz_mutants import Mutants
    from fuzz_seeds import read_seeds, write_seeds

    with TemporaryDirectory() as name:
        write_seeds(Path(name))
        seeds = read_seeds(Path(name))
    mutant = Mutants(seeds, options.seed).make(options.only)
    print(f"{mutant.seed}: {mutant.how}")
    print(Judge(seeds).outcome(mutant, options.only))
    return 0


def main() -> int:
    """Returns 1 if there were findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2**62, help="how many mutants")
    parser.add_argument("--seconds", type=float, default=1e9, help="on the clock")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--native", type=Path, help="compiled coders, those of `make fuzz`")
    parser.add_argument("--record", action="store_true", help="write bench/results/fuzz.json")
    parser.add_argument("--only", type=int, help="read this mutant alone")
    for name, kind in (("progress", Path), ("folder", Path), ("first", int), ("step", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.progress:
        work(options)
        return 0
    if options.only is not None:
        return once(options)
    options.native = options.native or sanitized()
    # So that a run in the background can be stopped and still say what it has done.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return int(run(options) > 0)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
