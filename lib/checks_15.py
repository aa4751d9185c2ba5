"""Exercises of lesson 15: stop in time, what is left after two sessions, who is free first, what it costs."""
import torch

from lib.checks import Check, Wrong, register


# ---------------------------------------------------------------- 1. stop in time

def working_seconds(limit, age, margin):
    """Seconds that the job may still work: the session's limit, less its age, less a margin; at least 0."""
    return max(0.0, limit - age - margin)


register(Check(
    name="working_seconds", reference=working_seconds,
    source="lib.checks_15:working_seconds lib.kaggle:working_seconds",
    cases=lambda g: [(43200.0, 600.0, 2520.0), (43200.0, 41000.0, 2520.0), (32400.0, 0.0, 900.0),
                     (43200.0, 30000.0, 0.0)],
    praise="Right: the job stops while there is still time to finish the batch, write the report and save.",
    hints=["Three numbers: how long a session lasts, how old it is "
           "now, and what has to happen after the job.",
           "limit - age is what is left of the session; the margin is not the job's.",
           "max(0.0, limit - age - margin)"],
    wrongs=[
        Wrong("age forgotten", lambda limit, age, margin: max(0.0, limit - margin),
              "you forget how old the session is: the clock runs from "
              "its start, not from the start of the job."),
        Wrong("margin forgotten", lambda limit, age, margin: max(0.0, limit - age),
              "you leave no margin: at the limit the session is taken "
              "away, with everything that is not saved yet."),
        Wrong("below zero", lambda limit, age, margin: limit - age - margin,
              "a session that is nearly over gives you a negative time (and "
              "--max-seconds 0 would mean: no limit). Stop at 0."),
        Wrong("margin added", lambda limit, age, margin: max(0.0, limit - age + margin),
              "you add the margin; it has to be kept back."),
        Wrong("hours", lambda limit, age, margin: max(0.0, limit - age - margin) / 3600,
              "these are hours; seconds were asked."),
    ]))


# ---------------------------------------------------------------- 2. what is left

FINAL = ("ok", "bad_input", "nan", "oom", "error")


def left_to_do(ids, sessions):
    """ids without a final row in any earlier session, in their order. sessions: lists of (id, status)."""
    done = {name for rows in sessions for name, status in rows if status in FINAL}
    return [name for name in ids if name not in done]


def _left(ids, sessions, final=FINAL):
    done = {name for rows in sessions for name, status in rows if status in final}
    return [name for name in ids if name not in done]


def _session_cases(g):
    ids = ["d.png", "a.png", "c.png", "b.png", "e.png", "f.png"]
    first = [("d.png", "ok"), ("a.png", "bad_input"), ("c.png", "start"), ("b.png", "start")]
    second = [("b.png", "ok"), ("e.png", "start")]
    return [(ids, [first, second]), (ids, [first]), (ids, []),
            (["x.png"], [[("x.png", "start")], [("x.png", "nan")]]),
            (["x.png", "y.png"], [[("x.png", "start"), ("x.png", "ok")],
                                  [("x.png", "start"), ("y.png", "start")]])]


register(Check(
    name="left_to_do", reference=left_to_do, cases=_session_cases,
    source="lib.checks_15:left_to_do lib.jobs:adopt",
    praise="Right: sessions add up, a broken file is a final answer, and what was only begun is done again.",
    hints=["Collect the ids that have a final row anywhere, in a set.",
           'Final are "ok", "bad_input", "nan", "oom" and "error"; "start" only says that work began.',
           'done = {i for rows in sessions for i, status in rows if '
           'status != "start"}; then keep the order of ids.'],
    wrongs=[
        Wrong("last session only", lambda ids, sessions: _left(ids, sessions[-1:]),
              "you look at the last session only. What the first one did "
              "would be done again: the sessions add up."),
        Wrong("start counts", lambda ids, sessions: _left(ids, sessions, (*FINAL, "start")),
              'you count "start" as done: what was in flight when a session ended would never be done.'),
        Wrong("only ok", lambda ids, sessions: _left(ids, sessions, ("ok",)),
              'you count "ok" alone. A broken file stays broken: each session '
              'would try it again, and the job never ends.'),
        Wrong("sorted", lambda ids, sessions: sorted(_left(ids, sessions)),
              "the right ones, in another order: keep the order of the frozen list, it decides the shards."),
        Wrong("last word", lambda ids, sessions: [i for i in ids if dict(
            pair for rows in sessions for pair in rows).get(i, "start") == "start"],
              'you let a later "start" undo a result: a session that was not shown '
              'the earlier one begins again, but what is done stays done.'),
        Wrong("what is done", lambda ids, sessions: [i for i in ids if i not in _left(ids, sessions)],
              "these are the ones that are done; those that are left were asked."),
    ]))


# ---------------------------------------------------------------- 3. the next free one takes the next

def finish_time(durations, speeds):
    """Seconds until the last piece of work is done, when whoever is free takes the next one.

    durations: seconds of each piece on a worker of speed 1, in order; speeds: of the workers. Free at the
    same moment: the first of them.
    """
    free = [0.0] * len(speeds)
    for seconds in durations:
        worker = free.index(min(free))
        free[worker] += seconds / speeds[worker]
    return max(free)


def _fixed(durations, speeds, who):
    free = [0.0] * len(speeds)
    for k, seconds in enumerate(durations):
        worker = who(k, len(durations), len(speeds))
        free[worker] += seconds / speeds[worker]
    return max(free)


def _work_cases(g):
    some = [1.0 + float(x) for x in torch.rand(9, generator=g)]
    return [([4.0, 1.0, 3.0, 2.0, 5.0, 1.0], [1.0, 0.5]), (some, [1.0, 0.7, 0.6]), ([3.0], [1.0, 1.0])]


register(Check(
    name="finish_time", reference=finish_time, cases=_work_cases,
    source="lib.checks_15:finish_time lib.widgets_15:hand_out",
    praise="Right: nobody has to know beforehand who is fast. That is "
           "why workers claim shards one at a time.",
    hints=["Keep one number for each worker: when it will be free.",
           "The next piece goes to the worker with the smallest number, which grows by seconds / speed.",
           "worker = free.index(min(free)); free[worker] += seconds / speeds[worker]; at the end max(free)"],
    wrongs=[
        Wrong("fixed halves", lambda d, s: _fixed(d, s, lambda k, n, m: k * m // n),
              "you cut the list into fixed parts, one for each worker: the "
              "fast one ends early and waits for the slow one."),
        Wrong("round robin", lambda d, s: _fixed(d, s, lambda k, n, m: k % m),
              "you deal the pieces out in turn, like cards: the slow worker gets as many as the fast one."),
        Wrong("first to finish it", lambda d, s: _earliest(d, s),
              "you give each piece to whoever would FINISH it first. Nobody knows that beforehand: it goes "
              "to whoever is free first, also if that one is slow."),
        Wrong("sorted", lambda d, s: finish_time(sorted(d, reverse=True), s),
              "you begin with the longest piece. That would help, but how long a piece takes is known only "
              "afterwards: keep the order."),
        Wrong("ideal", lambda d, s: sum(d) / sum(s),
              "this is the ideal, as if a piece could be shared out "
              "like water: a shard is done by one worker."),
        Wrong("speeds ignored", lambda d, s: finish_time(d, [1.0] * len(s)),
              "you forget the speeds: a worker of speed 0.5 takes twice as long."),
        Wrong("speed multiplied", lambda d, s: finish_time(d, [1 / x for x in s]),
              "you multiply by the speed: a slow worker (0.5) would take HALF as long. Divide."),
        Wrong("first to finish", lambda d, s: _first(d, s),
              "you give the moment when the FIRST worker has nothing "
              "left; the job is done when the last one is."),
    ]))


def _earliest(durations, speeds):
    end = [0.0] * len(speeds)
    for seconds in durations:
        worker = min(range(len(speeds)), key=lambda k: end[k] + seconds / speeds[k])
        end[worker] += seconds / speeds[worker]
    return max(end)


def _first(durations, speeds):
    free = [0.0] * len(speeds)
    for seconds in durations:
        worker = free.index(min(free))
        free[worker] += seconds / speeds[worker]
    return min(free)


# ---------------------------------------------------------------- 4. what an image costs

def image_seconds(steps, passes_a_step, unet, rest, peak, used):
    """Seconds of one image on a card. unet: TFLOP of one pass; rest: TFLOP of everything that happens once an
    image; peak: TFLOP a second of the card; used: the share of it that is reached."""
    return (steps * passes_a_step * unet + rest) / (peak * used)


register(Check(
    name="image_seconds", reference=image_seconds,
    source="lib.checks_15:image_seconds lib.widgets_15:seconds_an_image",
    cases=lambda g: [(9, 3, 0.8, 11.0, 65.0, 0.2), (50, 3, 0.8, 11.0, 65.0, 0.35),
                     (20, 2, 2.1, 24.0, 312.0, 0.17)],
    praise="Right. Read it backwards too: from measured images a second it gives "
           "`used`, the only number here that was assumed.",
    hints=["Work first, in TFLOP: what each step costs, times the steps, plus what happens once.",
           "Then the speed, in TFLOP a second: the card's peak times the share that is reached.",
           "(steps * passes_a_step * unet + rest) / (peak * used)"],
    wrongs=[
        Wrong("peak", lambda steps, n, unet, rest, peak, used: (steps * n * unet + rest) / peak,
              "you divide by the peak of the data sheet, which no network reaches: times `used`."),
        Wrong("one pass a step",
              lambda steps, n, unet, rest, peak, used: (steps * unet + rest) / (peak * used),
              "a step is more than one pass: guidance and the layers "
              "run through the U-Net too (passes_a_step)."),
        Wrong("rest every step",
              lambda steps, n, unet, rest, peak, used: steps * (n * unet + rest) / (peak * used),
              "the VAE and the depth model run once an image, not in every step."),
        Wrong("rest forgotten", lambda steps, n, unet, rest, peak, used: steps * n * unet / (peak * used),
              "you leave out `rest`; at few steps the VAE and the depth model are a large part."),
        Wrong("used above the line",
              lambda steps, n, unet, rest, peak, used: (steps * n * unet + rest) * used / peak,
              "you multiply by `used`: a card that reaches less would be "
              "faster. It belongs to the speed, below the line."),
        Wrong("counted twice",
              lambda steps, n, unet, rest, peak, used: 2 * (steps * n * unet + rest) / (peak * used),
              "you count everything twice: FLOP here are multiplications AND additions already."),
    ]))
