"""Reads scalars out of TensorBoard's event files, without TensorBoard.

A file is a sequence of records: 8 bytes of length, their checksum, the data, their
checksum. The data are an `Event` in protobuf's wire format, of which a few fields are
needed. What is no scalar (images, histograms, texts) is passed over.
"""

from collections.abc import Iterator
import functools
import pathlib
import struct
from typing import Any

# Fields of the messages, see event.proto, summary.proto and tensor.proto.
_EVENT_STEP, _EVENT_SUMMARY = 2, 5
_SUMMARY_VALUE = 1
_VALUE_TAG, _VALUE_SIMPLE, _VALUE_TENSOR = 1, 2, 8
_TENSOR_TYPE, _TENSOR_SHAPE, _TENSOR_CONTENT = 1, 2, 4
_SHAPE_DIM, _DIM_SIZE = 2, 1
# From a tensor's type to how one number is packed, and the field of a list of these.
_NUMBERS = {1: ("<f", 5), 2: ("<d", 6)}


class Corrupt(ValueError):
  """A file that holds something else than whole records."""


def looks_like_events(path: pathlib.Path) -> bool:
  """Whether a file begins with a record, or is named as TensorBoard names its own."""
  with path.open("rb") as file:
    head = file.read(12)
  return "tfevents" in path.name or (len(head) == 12 and _is_sound(head[:8], head[8:]))


def files(path: pathlib.Path) -> list[pathlib.Path]:
  """The event files at a path, the oldest first: itself, or those in a folder."""
  if not path.is_dir():
    return [path]
  # TensorBoard's names begin with the time.
  return sorted(x for x in path.iterdir() if "tfevents" in x.name and x.is_file())


def tags(path: pathlib.Path) -> list[str]:
  """The names of all scalars, in the order in which they come."""
  found: dict[str, None] = {}
  for file in files(path):
    for _, scalars in _events(file):
      found.update(dict.fromkeys(scalars))
  return list(found)


def history(path: pathlib.Path, tag: str) -> list[tuple[int, float]]:
  """The steps and values of one scalar, by step.

  A file that begins before another ends is that of a run that was resumed: what the
  older one has from there on was thrown away. Of two values of a step the last counts.
  """
  kept: dict[int, float] = {}
  for file in files(path):
    own = {step: x[tag] for step, x in _events(file) if tag in x}
    if own:
      first = min(own)
      kept = {step: x for step, x in kept.items() if step < first} | own
  return sorted(kept.items())


def _events(path: pathlib.Path) -> Iterator[tuple[int, dict[str, float]]]:
  """The step and the scalars of each event that has some."""
  for place, data, checksum in _records(path):
    try:
      step, scalars = _event(data)
    except (LookupError, TypeError, ValueError, struct.error) as error:
      raise Corrupt(f"its record at byte {place} is no event of TensorBoard") from error
    if scalars:
      # Not of all records: that of an image takes longer than all else.
      if not _is_sound(data, checksum):
        raise Corrupt(f"its record at byte {place} is corrupt: its checksum is wrong")
      yield step, scalars


def _records(path: pathlib.Path) -> Iterator[tuple[int, bytes, bytes]]:
  """Where each record begins, its data and their checksum."""
  place = 0
  with path.open("rb") as file:
    while len(head := file.read(12)) == 12:
      if not _is_sound(head[:8], head[8:]):
        raise Corrupt(f"there is no record of TensorBoard at byte {place}")
      (length,) = struct.unpack("<Q", head[:8])
      body = file.read(length + 4)
      if len(body) < length + 4:
        return  # A run that is being written, or was killed, ends anywhere.
      yield place, body[:-4], body[-4:]
      place += length + 16


def _event(data: bytes) -> tuple[int, dict[str, float]]:
  step, scalars = 0, {}
  for field, value in _fields(data):
    if field == _EVENT_STEP:
      step = value - (value >> 63 << 64)  # Negative ones are two's complements.
    elif field == _EVENT_SUMMARY:
      for inner, entry in _fields(value):
        if inner == _SUMMARY_VALUE:
          parts = dict(_fields(entry))
          number = _number(parts)
          if number is not None:
            scalars[parts[_VALUE_TAG].decode()] = number
  return step, scalars


def _number(parts: dict[int, Any]) -> float | None:
  """The number of a `Summary.Value`; None if it is none, or several."""
  if _VALUE_SIMPLE in parts:
    return float(struct.unpack("<f", parts[_VALUE_SIMPLE])[0])
  tensor = dict(_fields(parts.get(_VALUE_TENSOR, b"")))
  if tensor.get(_TENSOR_TYPE) not in _NUMBERS:
    return None
  dims = _fields(tensor.get(_TENSOR_SHAPE, b""))
  sizes = [dict(_fields(x)).get(_DIM_SIZE) for field, x in dims if field == _SHAPE_DIM]
  packed, listed = _NUMBERS[tensor[_TENSOR_TYPE]]
  data = tensor.get(_TENSOR_CONTENT) or tensor.get(listed, b"")
  if any(size != 1 for size in sizes) or len(data) != struct.calcsize(packed):
    return None
  return float(struct.unpack(packed, data)[0])


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
  """The numbers of a message's fields and their values: integers, or bytes."""
  at = 0
  while at < len(data):
    key, at = _varint(data, at)
    kind = key & 7
    if kind == 0:
      value, at = _varint(data, at)
      yield key >> 3, value
      continue
    if kind == 2:
      size, at = _varint(data, at)
    elif kind in (1, 5):
      size = 8 if kind == 1 else 4
    else:
      raise ValueError(f"unknown wire type {kind}")
    if at + size > len(data):
      raise ValueError("a field that ends after its message")
    yield key >> 3, data[at : at + size]
    at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
  """An integer of 7 bits a byte, the lowest first, and where it ends."""
  value, shift = 0, 0
  while True:
    byte = data[at]
    value |= (byte & 127) << shift
    at, shift = at + 1, shift + 7
    if byte < 128:
      return value, at


def _is_sound(data: bytes, checksum: bytes) -> bool:
  """Whether a masked CRC-32C is that of the data."""
  table = _table()
  crc = 0xFFFFFFFF
  for byte in data:
    crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
  crc ^= 0xFFFFFFFF
  masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
  return checksum == struct.pack("<I", masked)


@functools.cache
def _table() -> tuple[int, ...]:
  def entry(value: int) -> int:
    for _ in range(8):
      value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value

  return tuple(map(entry, range(256)))
