"""What is asked, and when is an answer right? One file a task; `registry` lists them."""
