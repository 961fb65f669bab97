"""Policies: networks that act or label from a memory."""
