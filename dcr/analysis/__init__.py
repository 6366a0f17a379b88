"""Analysis on arrays: probes, kernel, gradients, refusal scores. Knows no experiment."""
