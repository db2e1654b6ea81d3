"""What each mechanism does in the place of a model's own attention. Start at ``swap.plan_swap``."""
