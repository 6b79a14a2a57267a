"""What happens while somebody else trains; knows no Trainer."""
