// Dials the multiaddress of a dgnd with the identity of a seed, pings it and asks who it is; prints one line of JSON.
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { generateKeyPairFromSeed } from '@libp2p/crypto/keys'
import { identify } from '@libp2p/identify'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

// Packages below libp2p 2 want a function of Node 22.
Promise.withResolvers ??= () => {
  const made = {}
  made.promise = new Promise((resolve, reject) => Object.assign(made, { resolve, reject }))
  return made
}

const [address, seed] = process.argv.slice(2)
const node = await createLibp2p({
  privateKey: await generateKeyPairFromSeed('Ed25519', Buffer.from(seed, 'hex')),
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: { identify: identify({ runOnConnectionOpen: false }), ping: ping() }
})
const connection = await node.dial(multiaddr(address))
const pings = []
for (let n = 0; n < 3; n++) pings.push(await node.services.ping.ping(multiaddr(address)))
const found = await node.services.identify.identify(connection)
console.log(JSON.stringify({
  me: node.peerId.toString(),
  pings,
  peer: found.peerId.toString(),
  agent: found.agentVersion,
  listening: found.listenAddrs.map(String),
  observed: found.observedAddr?.toString(),
  protocols: found.protocols
}))
await node.stop()
