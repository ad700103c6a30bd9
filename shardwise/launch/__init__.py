"""How ranks are started, watched and ended: command line, launchers, supervision, `LLM`.

Importing this package does not import torch; ranks import it, their parent never does.

    cli/                        one module a verb
    llm, executors,             `LLM`, where its ranks are, its options, and a rank's end of a loaded model
    model_config, session
    env, machine                which rank this process is, and which machine
    start, job, interrupt       `run_job`: one function on several ranks; signals that end it
    local, torchrun, mpi, ray   who starts the ranks; `backend` is what they have in common
    supervise, failure,         the parent: hears its ranks, sees them die, names the cause
    postmortem, exit_status
    worker, guard, link, tether the rank: its body, the guard around it, its line to the parent, its life tied to it
    neighbours                  what a rank under the user's own launcher says of one that was killed
    generation, progress        what `bench generate` runs on every rank; progress of loading
    doctor                      what this machine offers, and what is wrong with it
"""
