"""What happens next: the speculation hierarchy, its session and its reports."""
