"""What is measured from commit to commit; self-contained, because asv runs it against old commits too."""
