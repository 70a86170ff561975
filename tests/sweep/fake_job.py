"""A stand-in for the process of a job: no smolrun in it, so that it starts in milliseconds.

It reads its order from stdin as a real one does, writes the files of a run, and behaves as the
job's `run_name` says.
"""

import json
import os
import pathlib
import signal
import sys
import time

order = json.loads(os.read(0, 1 << 20).split(b"\n")[0])
config, folder = order["config"], pathlib.Path(order["folder"])
behaviour, steps = config["run_name"] or "ok", config["training"]["steps"]
loss = 2.0 + config["optimizer"]["lr"]


def end(status, reason=None, code=0, done=steps):
    figures = {"final_train_loss": loss, "final_eval_loss": loss + 0.1, "wall_s": 1.5}
    summary = {"status": status, "reason": reason, "exit_code": code, "steps": done, **figures}
    summary["overrides"] = order["typed"]
    (folder / "summary.json").write_text(json.dumps(summary))
    sys.exit(code)


print(
    f"pid {os.getpid()} resume {config['checkpoint']['resume']} seed {config['seed']}", flush=True
)
if behaviour == "broken":
    print("smolrun: nothing was started: there is no data", flush=True)
    sys.exit(2)
if behaviour == "away" and config["checkpoint"]["resume"] and not (folder / "was-away").exists():
    (folder / "was-away").touch()
    print("smolrun: host pi cannot be reached", flush=True)
    sys.exit(3)
driver = {"pid": os.getpid(), "host": "elsewhere", "steps": steps, "unit": "tokens"}
(folder / "driver.json").write_text(json.dumps(driver))
with (folder / "metrics.jsonl").open("a") as metrics:
    for step in range(steps):
        event = {"event": "step", "step": step, "loss": loss, "tokens": 100, "time_s": 0.1 * step}
        metrics.write(json.dumps(event) + "\n")
ran_before = any(folder.parent.glob(f".{folder.name}.*"))
if behaviour == "fails" or (behaviour == "fails-once" and not ran_before):
    end("failed", "rank 1 was lost", 3)
if behaviour == "killed":
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
asked = False
while behaviour in ("waits", "stubborn", "away") and config["checkpoint"]["resume"] is None:
    said = os.read(0, 1 << 16)  # a line for each Ctrl-C, or its end
    if behaviour == "stubborn" and said and not asked:
        asked = True
        print("asked once", flush=True)
        continue
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True, exist_ok=True)
    end("stopped", "stopped by the user", 131 if asked else 130, 3)
if behaviour == "hangs":
    time.sleep(600)
end("done")
