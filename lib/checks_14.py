"""Exercises of lesson 14: the shown frame, shards, one final row for each input, and what is not shared."""
import torch

from lib.checks import Check, Wrong, register


# ---------------------------------------------------------------- 1. which frame is shown

def shown_frames(times, step):
    """times: the frames' timestamps in seconds, rising. Returns the number of the frame shown at each grid
    time.

    Grid times are times[0], times[0] + step, ... up to times[-1]; shown is the last frame with timestamp <=
    it.
    """
    shown, k = [], 0
    while times[0] + k * step <= times[-1]:
        shown.append(max(n for n, t in enumerate(times) if t <= times[0] + k * step))
        k += 1
    return shown


def _grid(times, step, rule, first=None):
    """A list over the grid, made by rule(times, t, k)."""
    first, k, out = times[0] if first is None else first, 0, []
    while first + k * step <= times[-1]:
        out.append(rule(times, first + k * step, k))
        k += 1
    return out


def _time_cases(g):
    """Timestamps on sixteenths of a second, so that comparisons are exact; a hole; a first one that is not
    0."""
    steady = [1.0 + k / 16 for k in range(20)]
    hole = [0.25, 0.375, 0.5, 1.5, 1.5625, 1.625, 2.125, 2.25]
    some = (torch.randint(1, 7, (12,), generator=g).cumsum(0) / 16 - 0.5).tolist()
    return [(steady, 0.25), (hole, 0.25), (some, 0.1875)]


def _nearest(times, t, k):
    return min(range(len(times)), key=lambda n: abs(times[n] - t))


register(Check(
    name="shown_frames", reference=shown_frames, cases=_time_cases,
    source="lib.checks_14:shown_frames lib.video:on_grid",
    praise="Right: at each moment you take what a player would show, also "
           "across a hole and from any first timestamp.",
    hints=["Write the grid times first: times[0] + k * step for k = 0, "
           "1, 2, ... as long as they are <= times[-1].",
           "A player shows a frame until the next one is due. So at time "
           "t: the LAST frame whose timestamp is <= t.",
           "max(n for n, s in enumerate(times) if s <= t) is that frame's number."],
    wrongs=[
        Wrong("nearest", lambda times, step: _grid(times, step, _nearest),
              "you take the NEAREST frame, which may lie in the future: a player shows the last frame that "
              "is already due (timestamp <= t). (ffmpeg's fps filter rounds "
              "to the nearest too, unless told otherwise.)"),
        Wrong("index times rate", lambda times, step: _grid(times, step, lambda ts, t, k: min(
            len(ts) - 1, round(k * step * (len(ts) - 1) / (ts[-1] - ts[0])))),
              "you count frames as if the rate were constant (k * step * fps). In a video with a variable "
              "rate that is the wrong frame; look at the timestamps."),
        Wrong("next frame", lambda times, step: _grid(times, step, lambda ts, t, k: min(
            n for n, s in enumerate(ts) if s >= t)),
              "you take the first frame with timestamp >= t: that one is not "
              "shown yet. Take the last with timestamp <= t."),
        Wrong("strictly before", lambda times, step: _grid(times, step, lambda ts, t, k: max(
            [n for n, s in enumerate(ts) if s < t], default=0)),
              "a frame is shown from its very timestamp on: use <=, not <."),
        Wrong("grid from zero", lambda times, step: _grid(times, step, lambda ts, t, k: max(
            [n for n, s in enumerate(ts) if s <= t], default=0), first=0.0),
              "your grid starts at 0 seconds, but a video's first timestamp "
              "may be anything (1.0 here): start at times[0]."),
        Wrong("end left out", lambda times, step: shown_frames(times, step)[:-1],
              "the last grid time is missing: the grid goes up to times[-1] "
              "and holds it (range and np.arange stop before)."),
        Wrong("no repeats", lambda times, step: sorted(set(shown_frames(times, step))),
              "you name each frame once. A frame that is shown at three "
              "grid times stands in the list three times."),
        Wrong("times", lambda times, step: [times[n] for n in shown_frames(times, step)],
              "these are the frames' timestamps; their numbers (0, 1, 2, ...) were asked."),
    ]))


# ---------------------------------------------------------------- 2. shards

def shard_slices(count, size):
    """[(start, stop), ...]: `count` inputs cut into shards of `size`, the last one maybe smaller, each input
    in exactly one."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


register(Check(
    name="shard_slices", reference=shard_slices, cases=lambda g: [(10, 4), (1000, 128), (256, 128), (3, 8)],
    source="lib.checks_14:shard_slices lib.jobs:Shard",
    praise="Right: every input is in exactly one shard, whoever works "
           "on it and however many workers there are.",
    hints=["range(0, count, size) gives the starts.", "The last shard may be smaller: its "
                                                      "stop is never beyond count.",
           "[(start, min(start + size, count)) for start in range(0, count, size)]"],
    wrongs=[
        Wrong("rest lost", lambda count, size: [(k * size, (k + 1) * size) for k in range(count // size)],
              "count // size forgets the rest: the last inputs are in no shard and would never be done. "
              "(This is how jobs lose pictures without an error.)"),
        Wrong("beyond the end", lambda count, size: [(s, s + size) for s in range(0, count, size)],
              "the last shard's stop lies beyond the list, so a count check "
              "(rows == stop - start) could never be right."),
        Wrong("inclusive", lambda count, size: [(s, min(s + size, count) - 1) for s in range(0, count, size)],
              "your stops are inclusive (the last index). Python's "
              "slices end before stop: items[start:stop]."),
        Wrong("number of shards", lambda count, size: [
            (k * -(-count // size), min((k + 1) * -(-count // size), count)) for k in range(size)],
              "you made `size` shards; `size` is how many inputs ONE shard holds. Otherwise the cut depends"
              " on the number of workers, and a restart with another number would find other shards."),
        Wrong("start and length", lambda count, size: [
            (s, min(size, count - s)) for s in range(0, count, size)],
              "your second number is how many there are; asked is where the slice stops: items[start:stop]."),
        Wrong("empty shard", lambda count, size: [
            (k * size, min((k + 1) * size, count)) for k in range(count // size + 1)],
              "where size divides count (256 and 128, say) your last shard is empty."),
        Wrong("overlap", lambda count, size: [
            (max(0, s - 1), min(s + size, count)) for s in range(0, count, size)],
              "neighbouring shards share an input, so it would be done twice."),
    ]))


# ---------------------------------------------------------------- 3. one final row for each input

FINAL = ("ok", "bad_input", "nan", "oom", "error")


def final_rows(rows):
    """rows: dicts {id, attempt, status} in the order they were read. Returns [(id, status), ...] sorted by
    id.

    One pair for each id that has a result: that of its highest attempt (of equal ones the first read). A row
    with status "start" only says that work began.
    """
    best = {}
    for row in rows:
        if row["status"] in FINAL and (row["id"] not in best or row["attempt"] > best[row["id"]]["attempt"]):
            best[row["id"]] = row
    return sorted((name, row["status"]) for name, row in best.items())


def _row_cases(g):
    row = lambda name, attempt, status: {"id": name, "attempt": attempt, "status": status}
    first = [row("a", 1, "start"), row("b", 1, "start"), row("c", 1, "start"), row("a", 1, "ok"),
             row("b", 1, "nan"), row("b", 2, "ok"), row("c", 1, "bad_input"), row("d", 1, "start"),
             row("c", 1, "error")]
    second = [row("x", 3, "ok"), row("x", 1, "oom"), row("y", 2, "start"), row("y", 1, "error"),
              row("z", 1, "start"), row("x", 2, "nan"), row("w", 1, "ok"), row("w", 1, "ok")]
    return [(first,), (second,)]


def _keep(rows, better, known=FINAL):
    best = {}
    for row in rows:
        if row["status"] in known and (row["id"] not in best or better(row, best[row["id"]])):
            best[row["id"]] = row
    return sorted((name, row["status"]) for name, row in best.items())


register(Check(
    name="final_rows", reference=final_rows, cases=_row_cases,
    source="lib.checks_14:final_rows lib.jobs:Shard.final_rows",
    praise="Right: whatever was killed and repeated, each input ends with one "
           "row, and a mere \"start\" counts as nothing.",
    hints=["Go through the rows once, and keep the best row seen for each id in a dict.",
           'Skip rows whose status is "start". Replace the kept row only when the new attempt is HIGHER.',
           'best = {}; for row in rows: if row["status"] != "start" and (row["id"] not in best or '
           'row["attempt"] > best[row["id"]]["attempt"]): best[row["id"]] = row'],
    wrongs=[
        Wrong("start counts", lambda rows: _keep(rows, lambda new, old: new["attempt"] > old["attempt"],
                                                 (*FINAL, "start")),
              'you count "start" as a result: an input that was in flight '
              'when the worker died would never be done.'),
        Wrong("last read wins", lambda rows: _keep(rows, lambda new, old: True),
              "you keep the row that was READ last. Files of several tries "
              "are read in any order: compare `attempt`."),
        Wrong("first wins", lambda rows: _keep(rows, lambda new, old: False),
              "you keep the first result, so a successful retry (attempt 2) is ignored."),
        Wrong("unsorted", lambda rows: [(name, dict(final_rows(rows))[name]) for name in dict.fromkeys(
            row["id"] for row in rows if row["status"] in FINAL)],
              "the right pairs, in the order in which they were read: sort them by id."),
        Wrong("later or equal", lambda rows: _keep(rows, lambda new, old: new["attempt"] >= old["attempt"]),
              "of two rows with the same attempt the first one read "
              "counts; you replaced it (use >, not >=)."),
        Wrong("only ok", lambda rows: _keep(rows, lambda new, old: new["attempt"] > old["attempt"], ("ok",)),
              'you keep only "ok": a broken file then has no row, and the job would try it again for ever. '
              'A bad input is a final answer too.'),
        Wrong("duplicates", lambda rows: sorted((r["id"], r["status"]) for r in rows if r["status"] in FINAL),
              "an input that was tried twice is in your list twice: one row for each id."),
    ]))


# ---------------------------------------------------------------- 4. what is not shared

def split_time(one, two):
    """(serial, shared) seconds an image, from the measured seconds an image on one and on two devices.

    The model: seconds = serial + shared / devices.
    """
    shared = 2 * (one - two)
    return one - shared, shared


register(Check(
    name="split_time", reference=split_time, cases=lambda g: [(2.5, 1.8), (1.0, 0.5), (0.4, 0.39)],
    source="lib.checks_14:split_time lib.widgets_14:fit",
    praise="Right. 2.5 s and 1.8 s mean that 1.1 s of every image are not "
           "shared by the two devices: that is where to work.",
    hints=["Write the model down twice: one = serial + shared, two = serial + shared / 2.",
           "Subtract: one - two = shared / 2.", "shared = 2 * (one - two); serial = one - shared."],
    wrongs=[
        Wrong("half saved", lambda one, two: (two, one - two),
              "one - two is only HALF of the shared part: the second device takes over half of it."),
        Wrong("swapped", lambda one, two: split_time(one, two)[::-1],
              "the two are swapped: (serial, shared) was asked."),
        Wrong("fractions", lambda one, two: tuple(x / one for x in split_time(one, two)),
              "these are shares of the time; seconds were asked (multiply by `one`)."),
        Wrong("ideal", lambda one, two: (two - one / 2, one),
              "your serial part is the distance from the ideal (one / 2), and your shared part is "
              "everything: then serial + shared is more than `one`."),
        Wrong("all shared", lambda one, two: (0.0, one), "this is the ideal case; the "
                                                         "measured `two` says otherwise."),
    ]))
