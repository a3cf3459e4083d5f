"""Conversations with models: their prompts, sessions to which rows are admitted while they run, and the HTTP server."""
