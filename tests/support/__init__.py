"""What tests share. Two families of small models are told apart by their first word:

- toy: Markov models of 2 to 10 symbols, their logits a table in float64. Every branch of a run over them can be walked,
  so that its law is known exactly. toy_models.py makes them and puts the real roles over them; enumeration.py walks.
- tiny: random checkpoints of real architectures (llama, qwen2, ...), saved as a hub folder is and run by transformers
  or by our engine. tiny_models.py makes them; tiny_runs.py runs the engine on them.

Contracts: all_caches.py has every cache in every tier, for the tests that hold each to a plain reference.

Stand-ins: fake_run.py for launch/run.py in sweeps, fake_crew.py for the processes of a run, fake_cuda.py for a device
that CUDA would give; recorded_operations.py and recorded_steps.py for what a CUDA graph records; made_up_sweep.py for a
finished sweep.

Tools: source_code.py reads the product's files and imports; compare_checkouts.py holds this checkout against another.
"""
