"""Examples (`sources`), their wording (`templates`), token ids (`tokens`), a run's lists of them (`tasks`).

`formats` and `libraries` open what a source names, `records` reads its records, `cache` keeps token ids on disk;
`builtin` is the built-in task.

Nothing is imported here: `datasets` and `transformers` cost seconds, so the modules load them when needed.
"""
