# SPDX-License-Identifier: Apache-2.0
"""``python test/fuzz_bags.py``: bags with seeded damage, 2,000 of each container, through the reader of recordings.

Bytes are changed, the file is cut, parts of it are exchanged, doubled, removed or zeroed, and sizes of records are
replaced. Whatever comes of it, reading ends soon, either with a ``MediaError`` or with frames; each frame comes once,
and its content is that of a frame that was written, unless a byte of it was changed; and where frames are missing,
something is said to be wrong. With ``--command-every N``, every N-th is given to ``evaluate_bag`` as well, in a process
of its own: its exit status, what it prints and its counts are those of what could be read (with N = 83, all kinds of
damage have their turn). ``test/recordings/test_bags_fuzz.py`` does a few of each in the suite.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from evaluation_inputs import write_model
from forked import start
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from deq_flow_ros.evaluation.command import main as evaluate_bag
from deq_flow_ros.recordings import MediaError, open_source
from deq_flow_ros.recordings.bag_reader import Bag
from deq_flow_ros.recordings.bag_source import IMAGE

COUNT, HEIGHT, WIDTH, FIRST_NS, STEP_NS = 24, 24, 40, 10**18, 40_000_000
TOPIC, CHUNK_BYTES = "/camera/image_raw", 10_000
LONGEST_S = 20.0
"""Of processor time, for reading one file."""
Damage = Callable[[bytearray, random.Random], bytearray]


def pixels(number: int) -> np.ndarray:
    """Content of a frame, which no other has."""
    return np.random.default_rng(number).integers(0, 256, HEIGHT * WIDTH * 3, np.uint8)


def write_bags(folder: Path) -> dict[str, Path]:
    """One file of each container, by its name."""
    made = {}
    for name, storage in (("mcap", StoragePlugin.MCAP), ("sqlite3", StoragePlugin.SQLITE3)):
        _write(Writer(folder / name, version=9, storage_plugin=storage), Stores.ROS2_JAZZY)
        made[name] = next(file for file in (folder / name).iterdir() if file.name != "metadata.yaml")
    for name, compression in (("ros1", None), ("ros1_bz2", Ros1Writer.CompressionFormat.BZ2)):
        old = Ros1Writer(folder / f"{name}.bag")
        old.chunk_threshold = CHUNK_BYTES
        if compression is not None:
            old.set_compression(compression)
        _write(old, Stores.ROS1_NOETIC)
        made[name] = folder / f"{name}.bag"
    for kind in (CompressionType.ZSTD, CompressionType.LZ4, CompressionType.NONE):
        made[f"chunks_{kind.name.lower()}"] = _write_chunks(folder / f"{kind.name}.mcap", kind, made["mcap"])
    return made


def _write_chunks(path: Path, compression: CompressionType, plain: Path) -> Path:
    """As rosbag2 writes MCAP: chunks with checksums."""
    text, _ = get_typestore(Stores.ROS2_JAZZY).generate_msgdef(IMAGE, ros_version=2)
    with path.open("wb") as file:
        writer = McapWriter(file, chunk_size=CHUNK_BYTES, compression=compression)
        writer.start("ros2", "test")
        channel = writer.register_channel(TOPIC, "cdr", writer.register_schema(IMAGE, "ros2msg", text.encode()))
        for recorded in Bag(plain).messages():
            writer.add_message(channel, recorded.time_ns, recorded.raw(), recorded.time_ns)
        writer.finish()
    return path


def _write(writer: Any, store: Stores) -> None:
    types = get_typestore(store)
    header, time_type = types.types["std_msgs/msg/Header"], types.types["builtin_interfaces/msg/Time"]
    with writer:
        connection = writer.add_connection(TOPIC, IMAGE, typestore=types)
        for number in range(COUNT):
            stamp_ns = FIRST_NS + number * STEP_NS
            stamp = time_type(*divmod(stamp_ns, 10**9))
            head = header(number, stamp, "eye") if store is Stores.ROS1_NOETIC else header(stamp, "eye")
            message = types.types[IMAGE](head, HEIGHT, WIDTH, "rgb8", 0, WIDTH * 3, pixels(number))
            code = types.serialize_ros1 if store is Stores.ROS1_NOETIC else types.serialize_cdr
            writer.write(connection, stamp_ns, code(message, IMAGE))


def change_bytes(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return data


def change_beginning_or_end(data: bytearray, rng: random.Random) -> bytearray:
    """Where header and index are."""
    for _ in range(rng.choice((1, 2, 8))):
        place = rng.randrange(min(4096, len(data)))
        data[place if rng.random() < 0.5 else -1 - place] = rng.randrange(256)
    return data


def cut(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def zero(data: bytearray, rng: random.Random) -> bytearray:
    """As a disk returns sectors that were never written."""
    start, size = rng.randrange(len(data)), rng.choice((16, 512, 4096, 20_000))
    end = min(len(data), start + size)
    data[start:end] = bytes(end - start)
    return data


def move_parts(data: bytearray, rng: random.Random) -> bytearray:
    """Exchange, double or remove a part."""
    size = rng.choice((8, 512, 4096))
    first, second = (rng.randrange(max(1, len(data) - size)) for _ in range(2))
    one, other = bytes(data[first : first + size]), bytes(data[second : second + size])
    kind = rng.randrange(3)
    if kind == 0:
        data[first : first + size], data[second : second + size] = other, one
    elif kind == 1:
        data[first:first] = one
    else:
        del data[first : first + size]
    return data


def change_sizes(data: bytearray, rng: random.Random) -> bytearray:
    """Small numbers of four bytes are lengths, more often than not."""
    places = [p for p in range(0, len(data) - 8) if data[p] > 0 and data[p + 2 : p + 4] == b"\0\0"]
    for place in rng.sample(places, min(len(places), rng.choice((1, 1, 4)))):
        new = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, len(data), rng.randrange(len(data)), rng.randrange(300)))
        data[place : place + 4] = new.to_bytes(4, "little")
    return data


DAMAGES: tuple[Damage, ...] = (change_bytes, change_beginning_or_end, cut, zero, move_parts, change_sizes)


@dataclass
class Tally:
    """What came of a number of damaged files; ``wrong`` lists what must not be."""

    outcomes: Counter[str] = field(default_factory=Counter)
    frames: int = 0
    slowest_s: float = 0.0
    commands: int = 0
    wrong: list[str] = field(default_factory=list)


def try_bags(files: dict[str, Path], folder: Path, seeds: range, command_every: int = 0) -> Iterator[tuple[str, Tally]]:
    """Damage and read each of the files with each of the seeds."""
    model = write_model(folder / "any.safetensors") if command_every else None
    known = {pixels(number).tobytes(): number for number in range(COUNT)}
    for name, whole in files.items():
        tally, content = Tally(), whole.read_bytes()
        path = folder / f"damaged{whole.suffix}"
        for seed in seeds:
            rng = random.Random(f"{name} {seed}")
            damage = DAMAGES[seed % len(DAMAGES)]
            path.write_bytes(damage(bytearray(content), rng))
            began = time.process_time()
            wrong = _try(path, known, tally)
            took = time.process_time() - began
            tally.slowest_s = max(tally.slowest_s, took)
            if took > LONGEST_S:
                wrong = f"took {took:.1f} s"
            if model is not None and not wrong and seed % command_every == 0:
                tally.commands += 1
                wrong = _try_command(path, model, folder / "out")
            if wrong:
                tally.wrong.append(f"{name}, seed {seed} ({damage.__name__}): {wrong}")
        yield name, tally


def _try(path: Path, known: dict[bytes, int], tally: Tally) -> str:
    """Read one file; says what is wrong with the way in which it was read."""
    found: list[int | None] = []
    said: list[str] = []
    try:
        source = open_source(path)
        try:
            found += (known.get(frame.data.tobytes()) for frame in source.frames())
        finally:
            said = source.skipped
    except MediaError as error:
        tally.outcomes["refused"] += 1
        return "" if str(error) else "refused without a word"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    tally.frames += len(found)
    tally.outcomes["damage named" if said else "read"] += 1
    intact = [number for number in found if number is not None]
    if len(set(intact)) < len(intact) and not said and len(found) > COUNT:
        return f"frames came twice: {found}"
    if len(found) < COUNT and not said:
        return f"{COUNT - len(found)} frames are missing, and nothing is said to be wrong"
    return ""


def _try_command(path: Path, model: Path, out: Path) -> str:
    """Evaluate one file; says what is wrong with what the command does."""
    source, frames, refused = None, 0, False
    with contextlib.suppress(MediaError):
        source = open_source(path)
    try:
        frames = sum(1 for _ in source.frames()) if source else 0
    except MediaError:
        refused = not frames
    refused |= source is None
    log = out.with_suffix(".log")
    usual = ["--model", model, "--max-iterations", 1, "--consistency-every", 0, "--no-bag", "--threads", 1]
    process = start(evaluate_bag, [path, "--out", out, *usual], log)
    process.join(120)
    status, said = process.exitcode, log.read_text()
    process.kill()
    metrics = out / "metrics.json"
    results = json.loads(metrics.read_text()) if metrics.exists() else None
    shutil.rmtree(out, ignore_errors=True)
    if status not in (0, 1, 2) or "Traceback" in said:
        return f"evaluate_bag ends with {status} and says {said[-500:]!r}"
    if refused or results is None:
        right = refused and status == 2 and results is None and "\nevaluate_bag: " in f"\n{said}"
        return "" if right else f"evaluate_bag ends with {status}, and the recording can be read: {not refused}"
    counts, problems = results["settings"][0]["frames"], results["problems"]
    if counts["all"] != frames or sum(counts[name] for name in ("processed", "first", "dropped")) != frames:
        return f"evaluate_bag counts {counts} of {frames} frames"
    shown = f"{frames}   ({counts['processed']} with flow, {counts['first']} first, {counts['dropped']} dropped)"
    if shown not in said or any(problem not in said for problem in problems):
        return f"evaluate_bag does not print {shown!r} or one of {problems}: {said!r}"
    return "" if status == bool(problems) else f"evaluate_bag ends with {status}, of {problems}"


def main() -> int:
    """Run; the exit status is 1 where something was wrong."""
    parser = argparse.ArgumentParser(description="Read bags with seeded damage.")
    parser.add_argument("--seeds", type=int, default=2000, help="of each container (default: 2000)")
    parser.add_argument("--only", default="", metavar="NAME", help="containers whose names begin so (default: all)")
    every = "evaluate every N-th with evaluate_bag as well; 0: none (default)"
    parser.add_argument("--command-every", type=int, default=0, metavar="N", help=every)
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp(prefix="fuzz_bags_"))
    wrong = 0
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        seeds = range(options.first, options.first + options.seeds)
        files = {name: file for name, file in write_bags(folder).items() if name.startswith(options.only)}
        for name, tally in try_bags(files, folder, seeds, options.command_every):
            outcomes = ", ".join(f"{count} {what}" for what, count in sorted(tally.outcomes.items()))
            took = f"slowest {tally.slowest_s:.2f} s"
            ran = f"{tally.commands} evaluated; " if options.command_every else ""
            print(f"{name}: {outcomes}; {tally.frames} frames; {took}; {ran}{len(tally.wrong)} wrong")
            print("".join(f"  {line}\n" for line in tally.wrong[:20]), end="", flush=True)
            wrong += len(tally.wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
