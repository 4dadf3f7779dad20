"""What goes to the Hub: the model card, the push in one commit, the metrics in the card's header."""
