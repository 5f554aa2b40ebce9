"""What a build did, in figures and in the lines that the command prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from teacher_cache.passes.unit_writer import UnitWriter
from teacher_cache.prompts.problems import MAX_LISTED, Problem


@dataclass(slots=True)
class PassFigures:
    """One pass of a build."""

    rows: int = 0
    positions: int = 0
    """Supervised positions."""
    tokens: int = 0
    """Tokens that the engine had to process: answers in pass 1, whole sequences in pass 2."""
    seconds: float = 0.0
    """Wall time from the first request to the last part on disk, the engine's start left out."""
    seconds_in_engine: float = 0.0
    """Part of it in which this process waited for the engine."""
    seconds_waiting: float = 0.0
    """Part of it in which the engine stood still for the writer: its queue was full, or only the last writes were left.
    """
    seconds_writing: float = 0.0
    """Encoding and writing, in a thread beside the engine."""

    def count_writer(self, writer: UnitWriter) -> None:
        """Add what a pass's writer took, once it is closed."""
        self.seconds += writer.seconds_draining
        self.seconds_waiting += writer.seconds_full + writer.seconds_draining
        self.seconds_writing += writer.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of wall time; 0 where nothing ran."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def idle_share(self) -> float:
        """Share of the wall time in which the engine had nothing asked of it, at most (it may work on while we do not
        wait).
        """
        return max(0.0, 1.0 - self.seconds_in_engine / self.seconds) if self.seconds else 0.0


@dataclass(slots=True)
class BuildSummary:
    """Everything that `decant teach` has to say at its end."""

    cache: Path
    layer: str
    """NAME-HASH8 of the targets layer."""
    reused_rows: int = 0
    """Rows of sequences that were there before."""
    reused_parts: int = 0
    reuse: str | None = None
    """Which layer serves the capture, or what a new layer shares with those that were there."""
    groups: str = "first question"
    """Rule by which rows belong together in the hold-out (shared/cache/groups.py)."""
    notes: list[str] = field(default_factory=list)
    """What of the prompts' files was not read."""
    generated: PassFigures = field(default_factory=PassFigures)
    """Pass 1 by an engine."""
    imported: PassFigures = field(default_factory=PassFigures)
    """Pass 1 with the data's own answers."""
    scored: PassFigures = field(default_factory=PassFigures)
    """Pass 2."""
    hidden: PassFigures = field(default_factory=PassFigures)
    """Pass 3, where the recipe asks for hidden states."""
    hidden_layer: str | None = None
    """NAME-HASH8 of the hidden layer; None without one."""
    hidden_reused_rows: int = 0
    """Rows that the hidden layer covered before."""
    seconds_starting: float = 0.0
    """The engine's start."""
    duplicates: Counter[str] = field(default_factory=Counter)
    """Rows per source that an earlier row of this request repeats; counted when the job is planned."""
    truncated: int = 0
    """Answers cut by length, kept or dropped."""
    dropped: int = 0
    """Answers dropped because they were cut (`keep_truncated: false`)."""
    set_aside: list[Problem] = field(default_factory=list)
    """Rows that could not be used, the first of them; see `num_set_aside`."""
    num_set_aside: int = 0
    rows: int = 0
    """Rows of the cache now."""
    positions: int = 0
    """Supervised positions of the cache now."""
    unscored_parts: int = 0
    """Parts of sequences that the layer still lacks (other partitions' share)."""
    engines: int = 1
    """Engines at work."""
    engine_restarts: int = 0
    """Times that one of many engines died."""
    units_set_aside: list[str] = field(default_factory=list)
    """Units that killed two of many engines, each with its cause."""

    def add_problem(self, problem: Problem) -> None:
        """Count one row that was set aside, and list it while the list is short."""
        self.num_set_aside += 1
        if len(self.set_aside) < MAX_LISTED:
            self.set_aside.append(problem)

    def absorb(self, other: BuildSummary, num_engines: int) -> None:
        """Add what one of several engines did; time in it counts as its share, wall time is the caller's to measure."""
        for name, mine in self.passes.items():
            its = other.passes[name]
            mine.rows += its.rows
            mine.positions += its.positions
            mine.tokens += its.tokens
            mine.seconds_in_engine += its.seconds_in_engine / num_engines
            mine.seconds_waiting += its.seconds_waiting / num_engines
            mine.seconds_writing += its.seconds_writing
        self.truncated += other.truncated
        self.dropped += other.dropped
        self.num_set_aside += other.num_set_aside - len(other.set_aside)
        for problem in other.set_aside:
            self.add_problem(problem)

    @property
    def passes(self) -> dict[str, PassFigures]:
        """The figures of each pass, by the name under which its progress is shown."""
        return {"generate": self.generated, "import": self.imported, "score": self.scored, "capture": self.hidden}

    @property
    def tokens(self) -> int:
        """Tokens of all passes."""
        return sum(figures.tokens for figures in self.passes.values())

    @property
    def computed(self) -> bool:
        """Whether anything was computed."""
        return any(figures.rows for figures in self.passes.values())

    @property
    def seconds(self) -> float:
        """Wall time of all passes and the engine's start."""
        return self.seconds_starting + sum(figures.seconds for figures in self.passes.values())

    @property
    def seconds_writing(self) -> float:
        """Encoding and writing of all passes, beside the engine."""
        return sum(figures.seconds_writing for figures in self.passes.values())

    @property
    def seconds_waiting(self) -> float:
        """Time in which an engine stood still for the writer."""
        return self.generated.seconds_waiting + self.scored.seconds_waiting + self.hidden.seconds_waiting

    def set_aside_lines(self) -> list[str]:
        """Return how many rows cannot be used, in a line where there are any."""
        if not self.num_set_aside:
            return []
        first = self.set_aside[0].sentence()
        return [f"{self.num_set_aside:,} rows cannot be used and were set aside, the first: {first}"]

    def lines(self) -> list[str]:
        """Return the summary in plain lines."""
        new = self.imported.rows or self.generated.rows
        verb = "imported" if self.imported.rows else "generated"
        parts = "1 part" if self.reused_parts == 1 else f"{self.reused_parts:,} parts"
        lines = [f"reused {self.reused_rows:,} rows ({parts}), {verb} {new:,}, scored {self.scored.rows:,}"]
        if self.reuse:
            lines.append(self.reuse)
        if self.hidden_layer:
            lines.append(
                f"hidden layer {self.hidden_layer}: reused {self.hidden_reused_rows:,} rows, captured "
                f"{self.hidden.rows:,} with transformers on the same weights"
            )
        for name, figures in self.passes.items():
            if figures.rows and name != "import":
                lines.append(
                    f"{name}: {figures.tokens:,} tokens in {figures.seconds:,.1f} s, {figures.tokens_per_second:,.0f} "
                    f"tokens/s, engine idle at most {figures.idle_share:.0%} of it"
                )
        if self.computed:
            lines.append(
                f"engine start {self.seconds_starting:,.1f} s, encoding and writing {self.seconds_writing:,.1f} s "
                f"beside it, of which the engine waited {self.seconds_waiting:,.1f} s"
            )
        if self.engines > 1 or self.engine_restarts:
            lines.append(f"{self.engines:,} engines, restarts: {self.engine_restarts:,}")
        lines += [f"set aside: {unit}" for unit in self.units_set_aside]
        for source, count in sorted(self.duplicates.items()):
            lines.append(f"{source}: {count:,} rows repeat an earlier one and were left out")
        if self.truncated:
            fate = "dropped" if self.dropped else "kept without an end token"
            lines.append(f"{self.truncated:,} answers were cut by length and {fate}")
        lines += self.notes
        if self.groups == "prompt":
            lines.append(
                "rows belong together by their whole prompt, as this cache began: of a dialogue some may be held out "
                "and others trained on; a new cache goes by the first question"
            )
        lines += self.set_aside_lines()
        lines.append(f"{self.cache}: {self.rows:,} rows, {self.positions:,} positions, layer {self.layer}")
        if self.unscored_parts:
            lines.append(f"{self.unscored_parts:,} parts are left to other partitions")
        return lines
