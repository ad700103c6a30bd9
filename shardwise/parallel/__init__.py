"""The parallel runtime: tokenizer, layers, caches, scheduler, sampler, engine."""
