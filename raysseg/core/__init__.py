"""What the methods share, on RLlib: settings, environment, actor, learner, phases, replay and checkpoints."""
