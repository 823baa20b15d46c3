"""What the teacher sees and which tokens it teaches: prompts, contexts, replies, spans.

May import: config, problems, rewards.
"""
