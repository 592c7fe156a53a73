"""What looks for mistakes that would spoil a training unnoticed. The engine asks it; nothing here trains.

Before an engine is built: `usable` asks whether one rank's model fits, `elementwise` whether its optimizer does,
`verify_model` whether all ranks do together. In the loop: `attached` looks for parameters that came since and that
nobody trains, `passes` for passes that cannot work, or that no step follows.
"""
