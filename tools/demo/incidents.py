"""The operations domain: a log excerpt of three or four lines, and a diagnosis that names service, host, cause and
remedy.

One line (ERROR) shows the fault, another the harm that it does elsewhere, the rest is healthy noise or an unrelated
warning, in drawn order. The diagnosis has to pick the right service and host, map the symptom to its cause, and know
the remedy; its wording is drawn. Its four keywords appear in every wording. Cost: microseconds per example.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tools.demo.example import SLIP, USUAL_MISTAKE, Example, pick, pick_distinct

SERVICES = (
    "orders",
    "checkout",
    "billing",
    "search",
    "catalog",
    "gateway",
    "mailer",
    "profile",
    "inventory",
    "payments",
    "sessions",
    "reports",
    "uploads",
    "metrics",
    "queue",
    "ledger",
)
HOSTS = tuple(f"node{number}" for number in range(1, 10))


@dataclass(frozen=True)
class Fault:
    """A kind of fault: what the log shows, what it means, and what to do; {q} is a drawn number of two digits."""

    symptoms: tuple[str, ...]
    cause: str
    remedy: str
    reasons: tuple[str, ...]


FAULTS: tuple[Fault, ...] = (
    Fault(
        ("write failed, no space left on device", "cannot append, volume 100% used"),
        "full disk",
        "free space",
        ("nothing more can be written", "every write is refused"),
    ),
    Fault(
        ("killed by kernel, out of memory", "process received OOM kill, rss {q} GB"),
        "memory exhaustion",
        "raise the memory limit",
        ("the kernel ended the process", "the process used all its memory"),
    ),
    Fault(
        ("TLS handshake failed, certificate has expired", "x509 certificate no longer valid"),
        "expired certificate",
        "renew the certificate",
        ("clients refuse the connection", "no handshake succeeds"),
    ),
    Fault(
        ("lookup failed, no such host", "name resolution timed out after {q} s"),
        "DNS failure",
        "check the resolver",
        ("names do not resolve", "no address is found"),
    ),
    Fault(
        ("connection refused by database", "database port closed, {q} retries"),
        "database outage",
        "restart the database",
        ("no query gets through", "the database does not listen"),
    ),
    Fault(
        ("response 429, quota exceeded", "too many requests, limit {q} per second"),
        "rate limiting",
        "slow down the clients",
        ("requests come too fast", "the quota is used up"),
    ),
    Fault(
        ("login rejected, bad credentials", "token signature invalid, 401 returned"),
        "wrong credentials",
        "rotate the secret",
        ("nobody can log in", "the secret does not match"),
    ),
    Fault(
        ("parse error in config at line {q}", "unknown key in config, refusing to start"),
        "bad configuration",
        "roll back the change",
        ("the new file cannot be read", "the service does not start"),
    ),
    Fault(
        ("bind failed, address already in use", "port {q} is taken by another process"),
        "port conflict",
        "stop the other process",
        ("two processes want one port", "the port is not free"),
    ),
    Fault(
        ("heartbeat lost, {q}% packets dropped", "link flapping, retransmits at {q}%"),
        "packet loss",
        "replace the cable",
        ("messages get lost on the way", "the link is not stable"),
    ),
    Fault(
        ("timestamp is {q} s in the future", "clock offset {q} s, tokens rejected"),
        "clock drift",
        "sync the clock",
        ("its time is wrong", "its clock disagrees with the others"),
    ),
    Fault(
        ("deadlock found, transaction aborted", "lock wait exceeded {q} s"),
        "lock contention",
        "shorten the transactions",
        ("transactions wait for each other", "locks are held too long"),
    ),
    Fault(
        ("no free worker, {q} requests waiting", "thread pool exhausted"),
        "pool exhaustion",
        "add workers",
        ("all workers are busy", "requests wait for a thread"),
    ),
    Fault(
        ("replica is {q} s behind primary", "stale read, replication delayed"),
        "replication lag",
        "reduce the write load",
        ("readers see old data", "the replica cannot keep up"),
    ),
    Fault(
        ("checksum mismatch in block {q}", "unreadable page, data corrupt"),
        "data corruption",
        "restore the backup",
        ("the data on disk is damaged", "blocks no longer match"),
    ),
    Fault(
        ("open failed, permission denied", "cannot read key file, access denied"),
        "missing permission",
        "fix the file mode",
        ("the process may not read its files", "access is not granted"),
    ),
    Fault(
        ("image pull failed, tag not found", "container backoff, manifest unknown"),
        "missing image",
        "push the image",
        ("the container cannot start", "the registry does not know the tag"),
    ),
    Fault(
        ("too many open files", "accept failed, {q} descriptors in use"),
        "descriptor leak",
        "raise the file limit",
        ("no more files can be opened", "descriptors are never closed"),
    ),
)
MISTAKEN_FOR = {"clock drift": "wrong credentials", "packet loss": "DNS failure", "lock contention": "pool exhaustion"}
"""Causes whose usual mistake is another."""
HARMS = (
    "call to {s} failed, retrying",
    "upstream {s} returned 503",
    "no reply from {s} in {q} ms",
    "{s} unavailable, using fallback",
)
NOISE = (
    ("INFO", "request served in {q} ms"),
    ("INFO", "health check ok"),
    ("INFO", "cache hit rate {q}%"),
    ("INFO", "started in {q} ms"),
    ("WARN", "disk at {q}%"),
    ("WARN", "slow query, {q} ms"),
    ("WARN", "memory at {q}%"),
    ("INFO", "certificate valid for {q} days"),
)
QUESTIONS = (
    "What is the root cause?",
    "Diagnose the incident.",
    "What failed, and what should be done?",
    "Which service is at fault and why?",
)
DIAGNOSES = (
    "See ERROR {s} {h}: {why}. The fault is {c}. {M}.",
    "The root cause is in ERROR {s} {h}: {c}, because {why}. {M}, then {v} works again.",
    "Root cause: {c}. The line ERROR {s} {h} says that {why}. Next step: {m}.",
    "First came ERROR {s} {h}, so {s} has a fault: {c}, as {why}. To recover, {m}.",
    "The WARN {v} only follows. The line ERROR {s} {h} shows {c}: {why}. {M}.",
    "It is {c}: {why}. Look at ERROR {s} {h}, not at WARN {v}. {M} to recover.",
    "Look at ERROR {s} {h}. There {why}, which means {c}. Next step: {m}.",
    "The log points to {c} in ERROR {s} {h}: {why}, and {v} suffers with {s}. {M}.",
)


def _sentence(text: str) -> str:
    """The text with a capital at its start."""
    return text[0].upper() + text[1:]


def unsure_fault(rng: random.Random, fault: Fault) -> Fault:
    """The fault that an unsure diagnosis takes it for."""
    mistake = MISTAKEN_FOR.get(fault.cause)
    if mistake is not None and rng.random() < USUAL_MISTAKE:
        return next(other for other in FAULTS if other.cause == mistake)
    if rng.random() < SLIP["aiops cause"]:
        return pick(rng, [other for other in FAULTS if other is not fault])
    return fault


def example(rng: random.Random, unsure: bool = False) -> Example:
    """Draw one incident with one diagnosis; an unsure one may blame another line or another cause."""
    fault = pick(rng, FAULTS)
    broken, harmed, *others = pick_distinct(rng, SERVICES, 3 if rng.random() < 0.6 else 4)
    host, *elsewhere = pick_distinct(rng, HOSTS, len(others) + 2)
    lines = [("ERROR", broken, host, pick(rng, fault.symptoms)), ("WARN", harmed, elsewhere[0], pick(rng, HARMS))]
    lines += [
        (level, other, place, text)
        for other, place in zip(others, elsewhere[1:], strict=True)
        for level, text in [pick(rng, NOISE)]
    ]
    rng.shuffle(lines)
    minute, excerpt = rng.randint(10, 50), []
    for level, service, place, text in lines:
        excerpt.append(f"{minute} {level} {service} {place}: " + text.format(s=broken, q=rng.randint(11, 99)))
        minute += rng.randint(0, 2)
    prompt = "\n".join([*excerpt, pick(rng, QUESTIONS)])
    named, blamed, place = fault, broken, host
    if unsure:
        named = unsure_fault(rng, fault)
        if rng.random() < SLIP["aiops line"]:
            blamed, place = pick(rng, [(line[1], line[2]) for line in lines if line[0] != "ERROR"])
    remedy, why = named.remedy, pick(rng, named.reasons)
    answer = pick(rng, DIAGNOSES).format(
        s=blamed,
        v=harmed,
        h=place,
        c=named.cause,
        m=remedy,
        M=_sentence(remedy),
        why=why,
    )
    keywords = [broken, host, fault.cause, fault.remedy]
    record = {"prompt": prompt, "keywords": keywords, "reference": answer}
    return Example(prompt, answer, record, f"{fault.cause} {broken} {host}")
