"""Recall: statements are taught to a session, other text follows, and questions in new requests need the statements."""
