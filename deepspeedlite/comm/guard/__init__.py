"""What keeps strangers out of a job: see docs/security.md."""
