"""The shapes of a run's files, and one strict way to read them: what does not fit is named, never half used.

A file is checked as a whole before anything of it is shown; of a `.jsonl` file, each line. Numbers are finite and
below 1e15, so that sums and plots of them are finite, too; only a loss may be NaN or infinite, as of a training that
diverged. Nesting is bounded, and halves of characters and NUL become U+FFFD. Fields beyond these shapes are kept as
they are. Cost: linear in the file, about 5 microseconds a line beyond parsing it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from shared.errors import refused

MAX_FILE_BYTES = 256 << 20
MAX_DEPTH = 40
"""Of objects and lists in each other."""
_LARGEST = 1e15


def _moderate(value: float) -> float:
    if math.isfinite(value) and abs(value) > _LARGEST:
        raise ValueError("should be below 1e15")
    return value


Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-_LARGEST, le=_LARGEST)]
Loss = Annotated[float, Field(strict=True), AfterValidator(_moderate)]
Share = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e-6, le=1 + 1e-6)]
Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Bool = Annotated[bool, Field(strict=True)]


class Task(BaseModel):
    """A model's score on one task."""

    score: Share
    low: Share
    high: Share
    metric: str = ""
    num_questions: Count | None = None


class Bin(BaseModel):
    """One bin of a probability."""

    confidence: Share
    right: Share
    positions: Count | None = None


class HeldoutPart(BaseModel):
    """Held-out figures of one source; an older evaluation lacks some."""

    kl_nats: Number | None = None
    kl_low: Number | None = None
    kl_high: Number | None = None
    top1_agreement: Share | None = None
    top1_in_teacher_top5: Share | None = None
    acceptance_rate: Share | None = None
    acceptance_rate_at_most: Share | None = None
    calibration_error: Share | None = None
    perplexity: Number | None = None
    bits_per_byte: Number | None = None
    positions: Count | None = None
    rows: Count | None = None
    calibration: list[Bin] | None = None
    agreement_by_teacher_confidence: list[Bin] | None = None


class AnswersAlike(BaseModel):
    """What answers are like: of a round, or of a model to held-out prompts."""

    answers: Count
    cut: Share
    repeating: Share
    repeated: Share
    mean_tokens: Number
    beside_teacher: Number


class OwnAnswers(HeldoutPart):
    """Figures on a model's own answers to held-out prompts."""

    kl_nats: Number
    answers: AnswersAlike


class RoundAnswers(AnswersAlike):
    """A round of health.json."""

    round: Count


class LayerPart(HeldoutPart):
    """Held-out figures against one of several teachers."""

    kl_nats: Number


class Distance(BaseModel):
    """How far one teacher is from another."""

    of: str
    to: str
    kl_nats: Number | None = None
    top1_agreement: Share | None = None


class Distances(BaseModel):
    """evaluate/teachers/distances.json"""

    pairs: list[Distance]
    without_head: list[str] = []


class Heldout(HeldoutPart):
    """Held-out figures of all sources."""

    kl_nats: Number
    top1_agreement: Share
    by_source: dict[str, HeldoutPart] | None = None
    own: OwnAnswers | None = None
    """On the model's own answers."""
    row_kl: dict[str, tuple[Count, Number]] | None = None
    """Row key -> positions, sum of the KL in nats."""
    by_layer: dict[str, LayerPart] | None = None
    """The same rows against each of several teachers."""


class EvaluationIdentity(BaseModel):
    """What an evaluation was made of, as far as the report names it."""

    engine: str | None = None


class Made(BaseModel):
    """When and where a model was evaluated."""

    date: str | None = None
    decant: str | None = None
    machine: str | None = None
    peak_memory_bytes: Count | None = None
    memory_of: str | None = None


class TokenProbability(BaseModel):
    """Of the marked token, by each side."""

    teacher: Share
    student: Share


class LargestDivergence(BaseModel):
    """A held-out position where student and teacher part, in its context."""

    kl_nats: Number
    source: str
    before: str
    token: str
    after: str
    token_probability: TokenProbability
    teacher: list[tuple[str, Share]]
    student: list[tuple[str, Share]]


class Timing(BaseModel):
    """A line of train/STAGE/timing.jsonl"""

    tokens_per_second: Number | None = None


class Evaluation(BaseModel):
    """evaluate/MODEL.json"""

    made: Made | None = None

    tasks: dict[str, Task]
    heldout: Heldout | None
    identity: EvaluationIdentity = EvaluationIdentity()
    seconds: dict[str, Number] = {}


class CostOfModel(BaseModel):
    """A model of evaluate/cost/figures.json"""

    parameters: Number | None = None
    weights_bytes: Number | None = None
    memory_bytes: Number | None = None
    memory_above_start_bytes: Number | None = None
    seconds_to_first_token: Number | None = None
    tokens_per_second: Number | None = None
    tokens_per_second_batched: Number | None = None
    compression: Number | None = None
    speed_up: Number | None = None
    speed_up_batched: Number | None = None
    memory_of: str | None = None


class Cost(BaseModel):
    """evaluate/cost/figures.json"""

    models: dict[str, CostOfModel]


class HarnessMetric(BaseModel):
    """A figure of lm-evaluation-harness."""

    value: Number
    stderr: Number | None = None


class Harness(BaseModel):
    """evaluate/lm_eval/MODEL.json"""

    tasks: dict[str, dict[str, HarnessMetric]]


class AuditPart(BaseModel):
    """What one comparison of an audit found."""

    mean_kl: Number
    worst_kl: Number
    worst_label: Number
    worst_tail: Number
    top1_agreement: Share | None = None


class Faithfulness(BaseModel):
    """Whether a cache's rows are the teacher's."""

    rows: Count | None = None
    unfaithful: list[Any]
    stored: AuditPart
    control: AuditPart
    codec: AuditPart


class Truncation(BaseModel):
    """What one capture loses."""

    k: Count
    draws: Count
    mass: Number
    temperature: Number
    gradient_error: Number
    mean_gradient_error: Number | None
    bytes_per_position: Number
    kl_lost: Number | None = None
    own: Bool | None = None


class Audit(BaseModel):
    """audit.json"""

    faithfulness: Faithfulness
    truncation: list[Truncation]
    completion: str | None = None


class Step(BaseModel):
    """A line of train/STAGE/metrics.jsonl"""

    step: Count
    loss: Loss | None = None
    terms: dict[str, Loss] | None = None


class HeldoutStep(BaseModel):
    """A line of train/STAGE/evaluations.jsonl"""

    step: Count
    kl_nats: Loss | None = None
    by_source: dict[str, HeldoutPart] | None = None


class Health(BaseModel):
    """train/STAGE/health.json"""

    healthy: Bool | None = None
    checks: dict[str, Bool] = {}
    stopped: str | None = None
    rounds: list[RoundAnswers] = []


class Seconds(BaseModel):
    """seconds.json, of which each phase stands alone."""


class AnswerRow(BaseModel):
    """A line of evaluate/MODEL.answers.jsonl"""

    domain: str
    question: Count
    prompt: str
    answer: str
    reference: str | None = None
    score: Share | None = None
    reason: str | None = None
    tokens: Count | None = None
    truncated: Bool | None = None


class SideRow(BaseModel):
    """A line of evaluate/side_by_side/MODEL.answers.jsonl"""

    temperature: Number
    number: Count
    prompt: str
    answer: str
    reference: str | None = None
    tokens: Count | None = None
    truncated: Bool | None = None


def is_finite(value: Any) -> bool:
    """Tell whether a value is a number, and one that JSON has."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def fault_of(shape: type[BaseModel], value: Any) -> str:
    """Return where a value does not have a shape and what was expected, in a few words; empty where it does.

    >>> fault_of(Bin, {"confidence": "high", "right": 0.5})
    "confidence is 'high': input should be a valid number"
    """
    try:
        shape.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        message = first["msg"][:1].lower() + first["msg"][1:]
        if first["type"] == "missing":
            return f"{place} is missing"
        return f"{place} is {_brief(first['input'])}: {message}"
    return ""


def read_object(path: Path, shape: type[BaseModel]) -> tuple[dict[str, Any] | None, str]:
    """Return a JSON file's object, or None and why not: empty where there is no such file."""
    text, why = _text(path)
    value, why = _parsed(text) if not why and text is not None else (None, why)
    if value is None:
        return None, why
    why = fault_of(shape, value)
    return (None, why) if why else (value, "")


def read_lines(path: Path, shape: type[BaseModel]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a .jsonl file's sound lines, and for each of the others where it is and what is wrong with it."""
    faults: list[str] = []
    return list(_lines(path, shape, faults)), faults


def _lines(path: Path, shape: type[BaseModel], faults: list[str]) -> Iterator[dict[str, Any]]:
    text, why = _text(path)
    if why:
        faults.append(f"{path.name}: {why}")
    for number, line in enumerate((text or "").split("\n"), start=1):
        if line.strip():
            value, why = _parsed(line)
            why = why or fault_of(shape, value)
            if why or value is None:
                faults.append(f"{path.name}:{number}: {why}")
            else:
                yield value


def _text(path: Path) -> tuple[str | None, str]:
    try:
        if not path.is_file():
            return None, ""
        if path.stat().st_size > MAX_FILE_BYTES:
            return None, f"it is larger than {MAX_FILE_BYTES} bytes"
        return path.read_text(encoding="utf-8", errors="replace"), ""
    except OSError as error:
        return None, f"it cannot be read ({refused(error)})"


def _parsed(text: str) -> tuple[dict[str, Any] | None, str]:
    try:
        value = json.loads(text)
        if "\\u" in text or text.count("[") + text.count("{") > MAX_DEPTH:
            value = _plain(value, MAX_DEPTH)
    except (ValueError, RecursionError) as error:
        return None, f"it is no JSON ({str(error)[:80]})"
    return (value, "") if isinstance(value, dict) else (None, f"it is {_brief(value)}, expected an object")


def _plain(value: Any, depth: int) -> Any:
    if depth == 0:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\x00", "\ufffd")
    if isinstance(value, list):
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {_plain(key, 1): _plain(item, depth - 1) for key, item in value.items()}
    return value


def _brief(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _LARGEST:
        return "a number of more than 15 digits"
    return repr(value)[:40]
