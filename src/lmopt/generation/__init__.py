"""From logits to text, once for every engine."""
