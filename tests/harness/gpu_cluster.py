"""A whole cluster on one host under load: etcd, groups of ranks, the router, streams through `turbomesh bench http`;
in the middle one rank is killed, and its group is started again as a supervisor would. It passes when no request
failed and every answer is the one that the same prompt gets undisturbed.

On a GPU the last bits of a logit depend on the batch, so there an answer may also leave the undisturbed one at a near
tie: the cluster then gives the log-probabilities of that answer's tokens, and none may lie further than --tolerance
under the best token at its place. A lost or doubled token lies far under it."""
import argparse
import json
import os
import shutil
import signal
import sys
import time

from cluster import BIN, MODEL, SLOW, Cluster, Proc, wait_until

THINGS = ("a lighthouse", "the old ferry", "a clock without hands", "two rivers", "the last train", "a paper boat",
          "the night watch", "an empty house", "a letter from the sea", "the orchard", "a blind horse", "the bridge")
ASKS = ("Tell a story about {}.", "What do you know about {}?", "Describe {} to a child.", "Why do people fear {}?",
        "Write a poem about {}.", "What happened to {} in the winter?", "Who would buy {}, and what for?",
        "Explain in three steps how to draw {}.")
CHECKED_MAX = 400  # answers that are looked at token by token


def arguments():
    p = argparse.ArgumentParser(prog="gpu_cluster.sh BIN_DIR", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", default=MODEL, help="model folder (models/demo-20m)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    p.add_argument("--groups", type=int, default=2)
    p.add_argument("--tp", type=int, default=1, help="ranks of a group, each on its own GPU")
    p.add_argument("--allow-shared-gpu", action="store_true", help="every rank of every group on GPU 0")
    p.add_argument("--cache", help="--cache-max-entry-count of a worker; for several ranks of one GPU a small share")
    p.add_argument("--streams", type=int, default=256)
    p.add_argument("--seconds", type=float, default=300, help="time in which requests start")
    p.add_argument("--max-tokens", type=int, default=256, help="tokens of each answer")
    p.add_argument("--rank", type=int, default=-1, help="the rank that is killed; default: the last")
    p.add_argument("--no-restart", action="store_true", help="the killed group stays away")
    p.add_argument("--tolerance", type=float, help="in nats; default 0 (answers are equal) on the CPU, 0.25 on a GPU, 1 there in bfloat16")
    p.add_argument("--start-timeout", type=float, default=180, help="seconds until all groups serve")
    p.add_argument("--worker-args", default="", help="further options of every worker, in one word")
    p.add_argument("--router-args", default="", help="further options of the router, in one word")
    p.add_argument("--out", default=os.path.join(BIN, "..", "cluster-logs"),
                   help="folder for the logs and summary.json")
    o = p.parse_args()
    if o.tolerance is None:
        o.tolerance = 0 if o.device == "cpu" else 1 if "bfloat16" in o.worker_args else 0.25
    if o.groups < 1 or (o.groups == 1 and o.no_restart):
        p.error("one group has to come back")
    return o


class FireCluster(Cluster):
    def __init__(self, o):
        self.o = o
        args = ["--device", o.device, "--max-batch-size", str(min(o.streams, 4096)), *o.worker_args.split()]
        if o.device == "cpu" and "--threads" not in args:
            args += ["--threads", str(max(1, (os.cpu_count() or 1) // (o.groups * o.tp)))]
        if o.allow_shared_gpu:
            args += ["--allow-shared-gpu"]
        if o.cache:
            args += ["--cache-max-entry-count", o.cache]
        super().__init__(tp=o.tp, groups=[f"g{i}" for i in range(o.groups)], model=o.model, worker_args=args,
                         router_args=o.router_args.split(), folder=o.out, start_timeout=o.start_timeout)

    def group_args(self, name):
        own_gpus = self.o.device == "cuda" and not self.o.allow_shared_gpu
        return ["--device-index", str(int(name[1:]) * self.o.tp)] if own_gpus else []

    def rank_pid(self, name, rank):
        for pid in self.ranks(name):
            with open(f"/proc/{pid}/environ", "rb") as f:
                env = dict(e.split(b"=", 1) for e in f.read().split(b"\0") if b"=" in e)
            if int(env.get(b"OMPI_COMM_WORLD_RANK", 0) if self.tp > 1 else 0) == rank % self.tp:
                return pid
        raise AssertionError(f"group {name} has no rank {rank}")

    def ready(self, name):
        return f"{self.tag}-{name}" in self.ready_groups()

    def moved(self):
        """{cause and result: generations}"""
        return {k.replace('"', ""): int(v) for k, v in self.metric("turbomesh_migrations_total").items() if v}


class Load:
    """A run of `turbomesh bench http`, and afterwards what it recorded."""

    def __init__(self, c, name, prompts, seconds, requests=1 << 20):
        o = c.o
        self.record = os.path.join(c.dir, f"{name}.jsonl")
        self.limit = seconds + 120 * SLOW
        self.proc = Proc(name, [os.path.join(BIN, "turbomesh"), "bench", "http", f"http://127.0.0.1:{c.port}",
                                "--model", os.path.basename(os.path.normpath(o.model)), "--prompt-file", prompts,
                                "--streams", str(o.streams), "--max-tokens", str(o.max_tokens),
                                "--requests", str(requests), "--start-for", f"{int(seconds * 1000)}ms",
                                "--duration", f"{int(self.limit * 1000)}ms", "--record", self.record], c.dir)

    def wait(self):
        wait_until(f"{self.proc.name} ends", lambda: not self.proc.alive(), self.limit + 30, 0.1)
        self.proc.stop()
        self.ticks, self.answers = [], []
        with open(self.record) as f:
            for line in f:
                row = json.loads(line)
                (self.ticks if "t" in row else self.answers).append(row)
        if not self.answers or len(self.ticks) < 2:
            raise AssertionError(f"{self.proc.name} has no answers: {self.proc.tail()}")
        return self

    def rate(self, begin, end):
        """Tokens per second between two times, 0 for a span without two ticks."""
        span = [t for t in self.ticks if begin <= t["t"] <= end]
        if len(span) < 2:
            return 0.0
        return (span[-1]["tokens"] - span[0]["tokens"]) / (span[-1]["t"] - span[0]["t"])


def write_prompts(path, n):
    """Distinct questions: their answers tell them apart should streams be confused."""
    with open(path, "w") as f:
        for i in range(n):
            kind, i = divmod(i, len(ASKS) * len(THINGS))
            ask, thing = divmod(i, len(THINGS))
            f.write(ASKS[ask].format(THINGS[thing]) + (f" Version {kind + 1}." if kind else "") + "\n")
    with open(path) as f:
        return f.read().splitlines()


def undisturbed(c, prompts):
    """({prompt: its answer}, the run): every prompt once, with as many streams as later."""
    load = Load(c, "undisturbed", prompts, 120, min(c.o.streams, 256)).wait()
    bad = [a for a in load.answers if not a["ok"] or len(a["ids"]) != c.o.max_tokens]
    assert not bad, f"{len(bad)} requests failed before anything was disturbed: {load.proc.tail()}"
    return {a["prompt"]: a for a in load.answers}, load


def kill_and_restart(c, load, event):
    """Kills one rank of the first group; notes when, and when its group serves again."""
    o, name = c.o, "g0"
    full = f"{c.tag}-{name}"
    event["streams"] = wait_until("the group has streams", lambda: int(
        c.group_metric("turbomesh_group_in_flight").get(full, 0)), 30)
    pid = c.rank_pid(name, o.rank)
    event["rank"], event["pid"], event["kill"] = o.rank % o.tp, pid, time.monotonic()
    os.kill(pid, signal.SIGKILL)
    # The end of a whole group is its own matter, without help from here.
    wait_until("the killed rank's group is gone", lambda: not c.ranks(name) and not c.groups[name].alive(), 30)
    event["gone"] = time.monotonic()
    if o.no_restart:
        return
    c.groups[name].stop()
    wait_until("the router misses the group", lambda: not c.ready(name), 30)
    c.start_group(name)
    wait_until("the group is back", lambda: c.ready(name), o.start_timeout, 0.02)
    event["back"] = time.monotonic()
    wait_until("the group has streams again",
               lambda: not load.proc.alive() or c.group_metric("turbomesh_group_in_flight").get(full, 0), 30, 0.02)


def divergence(c, prompt, answer):
    """How far under the best token an answer's worst token lies, in nats, as the cluster itself sees it."""
    model = os.path.basename(os.path.normpath(c.o.model))
    st, _, r = c.post("/v1/chat/completions", {"model": model, "max_completion_tokens": 1, "return_token_ids": True,
                                               "messages": [{"role": "user", "content": prompt}]})
    assert st == 200, r
    begin = len(r["prompt_token_ids"])
    st, _, r = c.post("/v1/completions", {"model": model, "prompt": r["prompt_token_ids"] + answer["ids"],
                                          "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0})
    assert st == 200, r
    lp = r["choices"][0]["logprobs"]
    return max(max(top.values()) - own for own, top in
               zip(lp["token_logprobs"][begin:], lp["top_logprobs"][begin:]))


def compare(c, prompts, want, answers, kill):
    """Sorts the answers: equal, near (within the tolerance), wrong; the streams that saw the kill come first."""
    other = {}
    equal = 0
    for a in answers:
        w = want[a["prompt"]]
        if a["ids"] == w["ids"] and a["text"] == w["text"]:
            equal += 1
        elif len(a["ids"]) == len(w["ids"]):
            other.setdefault((a["prompt"], tuple(a["ids"])), []).append(a)
    wrong = [a for a in answers if len(a["ids"]) != len(want[a["prompt"]]["ids"])]
    near, worst, unchecked = 0, 0.0, 0
    order = sorted(other.values(), key=lambda same: not any(a["begin"] < kill < a["end"] for a in same))
    for i, same in enumerate(order):
        if i >= CHECKED_MAX:
            unchecked += len(same)
            continue
        apart = divergence(c, prompts[same[0]["prompt"]], same[0]) if c.o.tolerance > 0 else float("inf")
        if apart <= c.o.tolerance:
            near, worst = near + len(same), max(worst, apart)
        else:
            wrong += [dict(a, apart=apart) for a in same]
    return {"equal": equal, "near": near, "near_worst": worst, "unchecked": unchecked, "wrong": len(wrong),
            "wrong_worst": max([a.get("apart", float("inf")) for a in wrong], default=0)}, wrong


def worst(answers, key):
    return max((key(a) for a in answers), default=0.0)


def summary(c, calm, load, event, counts):
    kill, first = event["kill"], load.ticks[0]["t"]
    last = max(min(load.ticks[-1]["t"], first + c.o.seconds), event["gone"])
    back = event.get("back", event["gone"] + min(5, (last - event["gone"]) / 2))
    done = [a for a in load.answers if a["ok"]]
    gap = lambda a: a["gap"]
    to_first = lambda a: a["first"] - a["begin"]
    across = [a for a in done if a["begin"] < back and a["end"] > kill]
    before, after = [a for a in done if a["end"] <= kill], [a for a in done if a["begin"] >= back]
    ramp = min(2.0, (kill - first) / 4)
    return {
        "device": c.o.device, "groups": c.o.groups, "tp": c.o.tp, "streams": c.o.streams, "seconds": c.o.seconds,
        "tokens_per_s": {"undisturbed": calm.rate(0, 1e18), "before": load.rate(first + ramp, kill),
                         "during": load.rate(kill, back), "after": load.rate(back, last)},
        "longest_gap_s": {"undisturbed": worst(calm.answers, gap), "before": worst(before, gap),
                          "during": worst(across, gap), "after": worst(after, gap)},
        "longest_first_token_s": {"undisturbed": worst(calm.answers, to_first), "before": worst(before, to_first),
                                  "during": worst(across, to_first), "after": worst(after, to_first)},
        "killed_rank": event["rank"], "streams_of_the_group": event["streams"],
        "streams_across_the_kill": sum(a["begin"] < kill < a["end"] for a in done),
        "group_gone_s": event["gone"] - kill, "group_back_s": event["back"] - kill if "back" in event else None,
        "migrations": c.moved(), "answers": len(load.answers), "failed": len(load.answers) - len(done), **counts}


def show(s):
    print(f"{'':24s}{'undisturbed':>12s}{'before':>12s}{'during':>12s}{'after':>12s}")
    for key, unit, scale in (("tokens_per_s", "tokens/s", 1), ("longest_gap_s", "worst token gap, ms", 1e3),
                             ("longest_first_token_s", "worst first token, ms", 1e3)):
        print(f"{unit:24s}" + "".join(f"{v * scale:12.0f}" for v in s[key].values()))
    back = f"serves again after {s['group_back_s']:.1f} s" if s["group_back_s"] else "stays away"
    print(f"rank {s['killed_rank']} killed: its group had {s['streams_of_the_group']} streams, was gone after "
          f"{s['group_gone_s']:.1f} s, {back}; moved {s['migrations']}")
    print(f"answers {s['answers']}: equal {s['equal']}, parted at a near tie {s['near']} (worst {s['near_worst']:.3f} "
          f"nats), not looked at {s['unchecked']}, wrong {s['wrong']}; failed requests {s['failed']}", flush=True)


def problems(s):
    found = []
    if s["failed"]:
        found.append(f"{s['failed']} requests failed")
    if s["wrong"]:
        found.append(f"{s['wrong']} answers are not those of the undisturbed run (worst {s['wrong_worst']:.3f} nats)")
    if not s["streams_across_the_kill"] or not s["migrations"]:
        found.append("no stream was hit by the kill")
    if not (s["tokens_per_s"]["during"] or s["tokens_per_s"]["after"]):
        found.append("no tokens after the kill")
    return found


def run(o):
    o.out = os.path.abspath(o.out)
    os.makedirs(o.out, exist_ok=True)
    print(f"{o.groups} groups of tp {o.tp} on {o.device}, {o.streams} streams for {o.seconds:g} s, "
          f"{o.max_tokens} tokens each, {os.path.basename(os.path.normpath(o.model))}", flush=True)
    begin = time.monotonic()
    with FireCluster(o) as c:
        folder = c.dir
        print(f"all groups serve after {time.monotonic() - begin:.1f} s; logs in {folder}", flush=True)
        path = os.path.join(folder, "prompts.txt")
        prompts = write_prompts(path, min(o.streams, 256))
        want, calm = undisturbed(c, path)
        load, event = Load(c, "load", path, o.seconds), {}
        time.sleep(o.seconds / 2)
        kill_and_restart(c, load, event)
        load.wait()
        done = [a for a in load.answers if a["ok"]]
        counts, wrong = compare(c, prompts, want, done, event["kill"])
        s = summary(c, calm, load, event, counts)
        show(s)
        bad = problems(s)
        with open(os.path.join(folder, "summary.json"), "w") as f:
            json.dump(s, f, indent=1)
        with open(os.path.join(folder, "bad.jsonl"), "w") as f:
            f.writelines(json.dumps(a) + "\n" for a in [a for a in load.answers if not a["ok"]] + wrong)
        if s["failed"]:
            print(load.proc.tail())
    if not bad:  # all answers that were as they should be; of a run that failed they stay
        for name in ("load.jsonl", "undisturbed.jsonl", "bad.jsonl"):
            os.unlink(os.path.join(folder, name))
    shutil.rmtree(os.path.join(folder, "etcd"), ignore_errors=True)
    print("passed" if not bad else "FAILED: " + "; ".join(bad))
    return 1 if bad else 0


def main():
    o = arguments()

    def stop(sig, _):
        raise SystemExit(128 + sig)

    # Every wait below has its bound; the alarm is for what none of them saw.
    for sig in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(sig, stop)
    signal.alarm(int((o.seconds + 3 * o.start_timeout + 600) * SLOW))
    return run(o)


if __name__ == "__main__":
    sys.exit(main())
