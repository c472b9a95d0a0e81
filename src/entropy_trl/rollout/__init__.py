"""What a rollout is made of: dynamic sampling, advantages, diversity."""
