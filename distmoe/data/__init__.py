"""Text -> tokenized shards (prepare) -> token stream (tokens) -> batches of a step (batches)."""
