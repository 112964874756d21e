"""Conversations whose exact tokens the gateway keeps."""
