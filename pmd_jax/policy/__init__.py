"""The policy: token ids in, token ids out. It knows no problem, no reward and no memory."""
