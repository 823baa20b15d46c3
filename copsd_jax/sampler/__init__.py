"""The sampler: `truncate` (which tokens), `engine` (prefill, insert, decode), `host` (the loop)."""
