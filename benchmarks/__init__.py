"""Measurements, as ratios taken side by side in one run. ``python -m benchmarks`` runs them all.

__main__, page, report, plot      the run; its page, made of the JSON; what a measurement shows; SVG
common, processes, stored, small  texts and medians; new processes and the page cache; stored state; small models
first_token, turn, restore, capture, decode, memory, tree, codec, fork, scale  on the page
limits, llama_state, synthetic    of restore; of scale
siblings, explore, windows, keyframes, shared_prompts, replies, long, lossy, grid  of single decisions: see NOTES.md
"""
