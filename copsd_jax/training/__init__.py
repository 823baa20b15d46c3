"""The parts of a run: checked plan, loaded objects, rollouts, sequence layouts and train step.

May import: config, metrics, problems, rewards, runtime, teaching, attention, losses, model,
sampler, servers, weights.
"""
