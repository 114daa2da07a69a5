"""What keeps a store in shape: its status, its checks, few files instead of many, runs removed."""
