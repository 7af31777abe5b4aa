"""Who computes: the roles, their models and attention, and the rule by which a draft is accepted."""
