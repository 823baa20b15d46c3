"""A run: its checked plan, its loaded parts, rollouts, sequence layouts and the train step.

May import: config, metrics, problems, rewards, runtime, teaching, attention, losses, model,
sampler, servers, weights.
"""
