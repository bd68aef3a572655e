"""Makes the tables in docs/evidence.md, each from its study's rows."""

from studies import _regret
from studies import _spectral_results
from studies import _summary
from studies._summary import Row
from studies._summary import select
from studies._summary import values
from studies.untuned import GATE

USABLE = 95.0  # Percent.


def temporal_order(rows: list[Row]) -> str:
  """Counts solved seeds for each length, method and rate."""
  rates = values(rows, "rate")
  parts = []
  for length in values(rows, "length"):
    body = []
    for method in values(select(rows, length=length), "method"):
      mine = select(rows, length=length, method=method)
      best = _summary.most_solved(mine)
      low, high = _summary.wilson(_summary.solved(best), len(best["solved_at"]))
      body.append(
        [
          method,
          *(str(_summary.solved(row)) for row in mine),
          f"{_summary.solved(best)} of {len(best['solved_at'])} at {best['rate']:g}",
          f"{100 * low:.0f} to {100 * high:.0f}%",
        ]
      )
    head = [f"length {length}", *(f"{r:g}" for r in rates), "best", "95% interval"]
    parts.append(markdown(head, body))
  return "\n\n".join(parts)


def language(rows: list[Row]) -> str:
  """Lists losses at each method's best rate, then at every rate."""
  parts = []
  for optimizer in values(rows, "optimizer"):
    of_one = select(rows, optimizer=optimizer)
    methods, kinds = values(of_one, "method"), values(of_one, "batches")
    body = []
    for method in methods:
      cells = [method]
      for kind in kinds:
        best = _summary.least_loss(select(of_one, method=method, batches=kind))
        none = _summary.least_loss(select(of_one, method="none", batches=kind))
        lost = _summary.diverged(best) == len(best["loss"])
        cells.append(_loss(best) + ("" if lost else f" at {best['rate']:g}"))
        plain = best is none or lost
        cells.append("" if plain else _plus_minus(_summary.gain(best, none)))
      body.append(cells)
    head = [x for kind in kinds for x in (f"{kind}, own best rate", "minus none")]
    parts.append(markdown([optimizer, *head], body))
    for kind in kinds:
      rates = sorted(values(of_one, "rate"))
      body = []
      for method in methods:
        mine = select(of_one, method=method, batches=kind)
        found = {row["rate"]: _loss(row) for row in mine}
        body.append([method, *(found.get(rate, "") for rate in rates)])
      head = [f"{optimizer}, {kind}", *(f"{rate:g}" for rate in rates)]
      parts.append(markdown(head, body))
  return "\n\n".join(parts)


def shifting_scale(rows: list[Row]) -> str:
  """Lists accuracies at scale 1's best rate, and at each scale's."""
  scales = values(rows, "scale")
  kept, tuned = [], []
  for method in values(rows, "method"):
    rate = _summary.most_accurate(select(rows, method=method, scale="1"))["rate"]
    same = [select(rows, method=method, scale=s, rate=rate)[0] for s in scales]
    best = [
      _summary.most_accurate(select(rows, method=method, scale=s)) for s in scales
    ]
    least = min(_summary.mean(row["accuracy"]).value for row in same)
    kept.append([method, f"{rate:g}", *(_percent(row) for row in same), f"{least:.1f}"])
    tuned.append(
      [method, *(f"{_percent(row)} at {row['rate']:g}" for row in best)],
    )
  return "\n\n".join(
    [
      markdown(["rate kept", "rate", *scales, "least"], kept),
      markdown(["rate tuned at each scale", *scales], tuned),
    ]
  )


def batch_range(rows: list[Row]) -> str:
  """Lists mean accuracies, and the rates at which they are usable."""
  rates = values(rows, "rate")
  body = []
  for method in values(rows, "method"):
    mine = select(rows, method=method)
    best = _summary.most_accurate(mine)
    means = [_summary.mean(row["accuracy"]).value for row in mine]
    usable = [r["rate"] for r, m in zip(mine, means, strict=True) if m >= USABLE]
    body.append(
      [
        method,
        *(f"{m:.1f}" for m in means),
        f"{usable[0]:g} to {usable[-1]:g}" if usable else "none",
        f"{_percent(best)} at {best['rate']:g}",
      ]
    )
  head = ["method", *(f"{r:g}" for r in rates), "usable", "best"]
  return markdown(head, body)


def low_precision(rows: list[Row]) -> str:
  """Lists float16 by batch and loss scale, then bfloat16 in many leaves by rate."""
  half, many = select(rows, part="float16"), select(rows, part="bfloat16")
  methods = values(rows, "method")
  body = []
  for batch in values(half, "batch"):
    for scale in values(half, "loss_scale"):
      cells = [str(batch), f"mean, {scale:g}" if scale else "sum"]
      for row in select(half, batch=batch, loss_scale=scale):
        idle = sum(row["idle"]) / len(row["idle"]) / row["steps"]
        cells.append(f"{_percent(row)} ({100 * idle:.0f}%)")
      body.append(cells)
  parts = [markdown(["batch", "loss", *methods], body)]
  body = []
  for rate in values(many, "rate"):
    cells = [f"{rate:g}"]
    for row in select(many, rate=rate):
      cells += [_percent(row), f"{max(row['norms']):.2f}"]
    body.append(cells)
  head = ["rate", *(x for m in methods for x in (m, "largest norm / limit"))]
  return "\n\n".join([*parts, markdown(head, body)])


def qk_clip(rows: list[Row]) -> str:
  """Losses and largest logits for each rate and tau."""
  parts = []
  for optimizer in values(rows, "optimizer"):
    body = []
    for row in select(rows, optimizer=optimizer):
      none = select(rows, optimizer=optimizer, rate=row["rate"], tau=None)[0]
      steps = sum(row["scaled"]) / len(row["scaled"]) / row["steps"]
      bounded = row["tau"] is not None
      body.append(
        [
          f"{row['rate']:g}",
          f"{row['tau']:g}" if bounded else "none",
          _loss(row),
          _plus_minus(_summary.gain(row, none)) if bounded else "",
          _range(_summary.peaks(row)),
          _range(row["after"]) if any(row["scaled"]) else "",
          f"{100 * steps:.0f}%" if bounded else "",
        ]
      )
    head = ["tau", "held-out loss", "minus none", "largest logit", "after", "scaled"]
    parts.append(markdown([f"{optimizer}, rate", *head], body))
  return "\n\n".join(parts)


def update_clipping(rows: list[Row]) -> str:
  """Accuracies around the padding, then without it, then errors of the tokens."""
  padded, sparse = select(rows, task="padded"), select(rows, task="sparse")
  rates = [f"{rate:g}" for rate in values(padded, "rate")]
  around, plain, tokens = [], [], []
  for method in values(padded, "method"):
    cells, ends = [method], [method]
    for row in select(padded, method=method):
      means = {k: _summary.mean(row[k]) for k in ("before", "worst", "end")}
      if row["quiet"]:
        cells.append(f"{means['before'].value:.1f}, {means['worst'].value:.1f}")
        cells.append(f"{_summary.failed(row)} of {len(row['before'])}")
        cells.append(f"{means['end'].value:.1f} ± {means['end'].error:.1f}")
      else:
        ends.append(f"{means['end'].value:.1f} ± {means['end'].error:.1f}")
    around.append(cells)
    plain.append(ends)
  for method in values(sparse, "method"):
    cells = [method]
    for row in select(sparse, method=method):
      rare, common = (
        _summary.mean(_summary.errors(row, kind)) for kind in ("rare", "common")
      )
      cells.append(f"{rare.value:.3f} ± {rare.error:.3f} ({common.value:.4f})")
    tokens.append(cells)
  head = [x for rate in rates for x in (f"{rate}: before, worst", "fail", "end")]
  return "\n\n".join(
    [
      markdown(["padded", *head], around),
      markdown(["without padding, end", *rates], plain),
      markdown(
        ["sparse: rare (common)", *(f"{r:g}" for r in values(sparse, "rate"))], tokens
      ),
    ]
  )


def spectral(rows: list[Row]) -> str:
  """Lists scores for each task and optimizer, then what was to be compared."""
  return "\n\n".join(markdown(*table) for table in _spectral_results.tables(rows))


def untuned(rows: list[Row]) -> str:
  """Sums up regrets over all cells, then by kind of batches, scale and task."""
  study = _regret.Study(rows)
  names = study.ranked()
  kept, over_all, alone, at_one = study.kept()
  body = []
  for method in names:
    found = study.summary(method)
    solved = _solved(method)
    body.append(
      [
        method,
        f"{found.mean:.1f}",
        f"{found.worst:.0f}",
        f"{found.within:.0f}%",
        f"{found.tuned:.1f}",
        f"{found.harm:.1f}",
        str(found.harmed),
        "not run" if solved is None else f"{solved} of 16",
        "yes" if passes(found, over_all, solved) else "no",
      ]
    )
  head = [
    "mean",
    "worst",
    "within 2",
    "own rate",
    "harm",
    "harmed",
    "temporal order",
    "passes",
  ]
  fixed = markdown(
    ["without learning", "mean regret"],
    [
      ["the best constant of each cell", "0, by definition"],
      [f"{kept}, kept over all cells", f"{over_all:.1f}"],
      [f"{alone}, kept over the cells of scale 1", f"{at_one:.1f}"],
      ["no clipping", f"{study.mean_of('none'):.1f}"],
    ],
  )
  faults, scales = values(rows, "fault"), sorted(study.scales)
  tasks = values(rows, "task")
  cells = len(study.cells)
  parts = [
    [
      method,
      *(f"{study.mean_of(method, fault=x):.0f}" for x in faults),
      *(
        f"{sum(r.percent for r in study.all_of(method, [x])) / cells:.0f}"
        for x in scales
      ),
      *(f"{study.mean_of(method, task=x):.0f}" for x in tasks),
    ]
    for method in [*names, kept, "none"]
  ]
  columns = [*faults, *(f"x {s:g}" for s in scales), *tasks]
  return "\n\n".join(
    [markdown(["method", *head], body), fixed, markdown(["method", *columns], parts)]
  )


def horizon(rows: list[Row]) -> str:
  """Lists mean regrets by the number of steps, for each task and kind of batches."""
  study = _regret.Study(rows)
  steps = values(rows, "steps")
  body = [
    [
      f"{method}, {task}",
      *(
        f"{study.mean_of(method, task=task, fault=fault, steps=n):.1f}"
        for fault in values(rows, "fault")
        for n in steps
      ),
    ]
    for method in [*study.methods, "none"]
    for task in values(rows, "task")
  ]
  head = [f"{fault}, {n}" for fault in values(rows, "fault") for n in steps]
  return markdown(["mean regret after steps", *head], body)


def passes(found: _regret.Summary, constant: float, solved: int | None) -> bool:
  """Returns whether a method does all that `untuned.GATE` asks.

  Args:
    found: how it did.
    constant: the mean regret of the best constant that is kept over all cells.
    solved: how many seeds learned over 30 steps; `None` if that was not measured.
  """
  return (
    found.mean <= GATE["regret"] * constant
    and found.harm <= GATE["harm"]
    and solved is not None
    and solved >= GATE["solved"]
  )


def _solved(method: str) -> int | None:
  """Returns how many seeds learn over 30 steps; `None` if that was not measured."""
  import studies

  rows = select(studies.load("temporal_order"), length=30, method=method)
  return _summary.solved(_summary.most_solved(rows)) if rows else None


def markdown(head: list[str], body: list[list[str]]) -> str:
  """Writes a table; aligns all columns but the first to the right."""
  lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(row: Row) -> str:
  value, error = _summary.mean(row["accuracy"])
  return f"{value:.1f} ± {error:.1f}"


def _range(sizes: list[float | None]) -> str:
  """From the least to the largest, of what is known."""
  known = [x for x in sizes if x is not None]
  if not known:
    return ""
  least, most = min(known), max(known)
  text = f"{least:.3g} to {most:.3g}"
  return text if len(known) == len(sizes) else f"{text}, {len(known)} of {len(sizes)}"


def _plus_minus(difference: _summary.Mean) -> str:
  return f"{difference.value:+.3f} ± {difference.error:.3f}"


def _loss(row: Row) -> str:
  """Writes a mean and its error, and how many seeds diverged; no mean if all did."""
  dead, count = _summary.diverged(row), len(row["loss"])
  if dead == count:
    return "all diverge"
  value, error = _summary.mean(_summary.losses(row))
  return f"{value:.3f} ± {error:.3f}" + (
    f" ({dead} of {count} diverge)" if dead else ""
  )
