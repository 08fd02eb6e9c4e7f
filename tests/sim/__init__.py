"""Several nodes in one process, on virtual time: the real engine, sessions, hop servers, recovery and
compute of workers, over a network and around worker processes that are simulated.

Everything follows from one number, the seed. That takes:

* trio's MockClock: time jumps when everybody waits, so nothing depends on how fast this machine is;
* trio's scheduler in its deterministic mode, its shuffling seeded (`determinism`);
* every random draw of the code and of the simulation from the seed: nonces, session names, delays, victims;
* no thread and no child process: what the daemon gives to a thread is done at once, the digests of the
  model's files are known (`cluster`), workers compute in the process, and only their time is virtual
  (`worker`).

`python -m tests.sim` runs campaigns of faults; a seed that fails is printed, and runs again with `--seed`.
"""
