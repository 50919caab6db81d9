"""What running needs: settings, files, checkpoints, the ledger, several processes, pictures."""
