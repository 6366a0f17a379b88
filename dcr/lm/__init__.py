"""Language models: loading, chat, batches, hidden states, answers, served models."""
