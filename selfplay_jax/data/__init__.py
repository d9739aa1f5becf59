"""Examples (`sources`), their wording (`templates`), token ids (`tokens`); `builtin` is the built-in task.

Nothing is imported here: `datasets` and `transformers` cost seconds, so the modules load them when needed.
"""
